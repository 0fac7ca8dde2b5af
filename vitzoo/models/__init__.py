"""The families. Importing this package registers every model with timm and with vitzoo.registry."""

from vitzoo.models import litv2 as litv2
