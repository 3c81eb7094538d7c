"""``bench``: what a server does under load."""
