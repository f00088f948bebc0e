"""Slow one function down, so that a test can act while it runs.

Python imports this first if its folder is on PYTHONPATH.

DAD_FAST_SLOW is `module:function:seconds`; each call first writes the file DAD_FAST_SLOW_MARK-RANK.
"""

import importlib.util
import os
import sys
import time

MODULE, PATH, SECONDS = os.environ["DAD_FAST_SLOW"].split(":")
MARK = f"{os.environ['DAD_FAST_SLOW_MARK']}-{os.environ.get('RANK', 0)}"


class Finder:
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            *owners, last = PATH.split(".")
            owner = module
            for one in owners:
                owner = getattr(owner, one)
            setattr(owner, last, slowly(getattr(owner, last)))

        spec.loader.exec_module = exec_module
        return spec


def slowly(function):
    def slow(*arguments, **more):
        open(MARK, "w").close()
        time.sleep(float(SECONDS))
        return function(*arguments, **more)

    return slow


sys.meta_path.insert(0, Finder())
