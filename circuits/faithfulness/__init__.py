"""How much of the behaviour a circuit keeps when everything else is ablated.

`circuits.faithfulness` is a folder of modules and, in the front door, a function: the package itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `circuits.faithfulness.nodes.faithfulness`."""
        from circuits.faithfulness.nodes import faithfulness

        return faithfulness(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
