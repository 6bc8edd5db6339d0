"""What people use in a browser: see each package."""
