"""Rollout: the policy answers prompts."""
