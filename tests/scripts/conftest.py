"""The stand-ins are there for the tests of both scripts."""

from stand_ins import stand_in  # noqa: F401
