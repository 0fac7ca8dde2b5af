"""Layers that two families or more share, or that users build with."""
