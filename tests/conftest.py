"""Settings shared by all tests."""

import os

from hypothesis import settings

# The tests are about gloo ranks on a CPU, also on a machine that has a GPU; before torch asks for devices.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The first call of many torch functions is slow and CI machines are shared: a deadline per example would only be noise.
settings.register_profile("ramoe", deadline=None, max_examples=50)
settings.load_profile("ramoe")
