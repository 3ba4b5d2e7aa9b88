"""Where the time of training goes: ``python -m ikem_fast.profile``."""
