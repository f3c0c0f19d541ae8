"""Conversations and tokens: chat templates, answers, and the bytes that tokens stand for."""
