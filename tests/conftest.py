"""Settings shared by all tests."""

from hypothesis import settings

# The first call of many torch functions is slow and CI machines are shared: a deadline per example would only be noise.
settings.register_profile("ramoe", deadline=None, max_examples=50)
settings.load_profile("ramoe")
