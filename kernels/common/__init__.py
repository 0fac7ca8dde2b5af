"""What operators share: backends and the compiled extension."""
