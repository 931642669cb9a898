"""Gates and planners: scores to Plans."""
