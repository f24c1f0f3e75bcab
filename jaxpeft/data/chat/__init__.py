"""Conversations: rendered in the form that a template takes, and what of them is learned."""
