"""Children of mmengine's root registries.

``locations`` makes mmengine import our modules on the first look-up, so ``las_mm.LASResNet``
resolves in any mm project without ``custom_imports``.
"""

from las_mm.dependencies import check_together, require

check_together()
require("mmengine", "las_mm")

from mmengine.registry import HOOKS as MMENGINE_HOOKS  # noqa: E402
from mmengine.registry import METRICS as MMENGINE_METRICS  # noqa: E402
from mmengine.registry import MODELS as MMENGINE_MODELS  # noqa: E402
from mmengine.registry import Registry  # noqa: E402

MODELS = Registry(
    "model", parent=MMENGINE_MODELS, scope="las_mm", locations=["las_mm.models", "las_mm.losses"]
)
HOOKS = Registry("hook", parent=MMENGINE_HOOKS, scope="las_mm", locations=["las_mm.hooks"])
METRICS = Registry("metric", parent=MMENGINE_METRICS, scope="las_mm", locations=["las_mm.hooks"])
