"""A quality target instead of thresholds: traces, replays, search, and proof by real pairs."""

from .guard import ProfileGuard
from .matching import profile_for
from .profile import Profile, ProfileWarning, load_profile
from .target import Target
from .tuning import tune, tune_all

__all__ = ["Profile", "ProfileGuard", "ProfileWarning", "Target", "load_profile", "profile_for", "tune", "tune_all"]
