"""Publishing: results, authorization record, figure and model card (import names from ``hf_ntp``)."""
