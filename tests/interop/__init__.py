"""Tests of movq_cli/interop."""
