"""Torture: real agents in network namespaces, attacked under load, and a history that is checked afterwards."""
