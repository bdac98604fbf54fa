"""Judges of single videos: detector, LPIPS, CLIP, VBench, EvalCrafter."""
