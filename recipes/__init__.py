"""Scripts of whole runs; installed as `hf_ntp.recipes`, so that the command `hf-ntp` has them."""
