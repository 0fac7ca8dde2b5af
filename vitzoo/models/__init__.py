"""The families. Importing this package registers every model with timm and with vitzoo.registry."""

from vitzoo.models import cvt as cvt
from vitzoo.models import evit as evit
from vitzoo.models import litv2 as litv2
from vitzoo.models import timm_reference as timm_reference
from vitzoo.models import twins_poly as twins_poly
from vitzoo.models import vim as vim
from vitzoo.models import vit_poly as vit_poly
