"""Card template and rendered examples; installed as `hf_ntp.model_cards`."""
