"""``python -m ikem_fast.profile``: where the time of a training step goes, phase by phase, against the floor."""

from __future__ import annotations

import sys

if __name__ == "profile":
    # Python runs within the package's folder, and somebody asks for the standard library's module of this name.
    import importlib.util
    import sysconfig

    _spec = importlib.util.spec_from_file_location("profile", f"{sysconfig.get_path('stdlib')}/profile.py")
    sys.modules["profile"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["profile"])
else:
    from ikem_fast.profiling.command import main

    if __name__ == "__main__":
        sys.exit(main())
