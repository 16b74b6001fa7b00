"""Training of compressed nets: stages that a loop of one's own, or ours, calls once after each optimizer step.

Needs torch, so `import codeword` does not import this package.
"""
