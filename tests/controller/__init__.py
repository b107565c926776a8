"""Tests of the controller, on real servers."""
