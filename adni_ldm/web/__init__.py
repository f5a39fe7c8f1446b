"""What app.py shows and accepts."""
