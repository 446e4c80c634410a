"""The benchmarks whose results are in docs/measured.md; each module measures one part of movq."""
