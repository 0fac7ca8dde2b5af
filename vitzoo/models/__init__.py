"""The families. Importing this package registers every model with timm and with vitzoo.registry."""
