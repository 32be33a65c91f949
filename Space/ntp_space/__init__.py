"""What the Space shows and how it answers; `app.py` starts it."""
