"""Settings of evaluations that tests run in parts."""

from s2q.evaluation.evaluate import TRAJECTORY_BYTES, EvaluationSettings


def evaluation_settings(**requested):
    """Return the settings that `evaluate` has by default, with these of the generated videos."""
    return EvaluationSettings(
        metrics=(),
        requested=requested,
        batch_size=None,
        device="cpu",
        dtype=None,
        variant=None,
        verify=None,
        lpips_weights=None,
        clip=None,
        trajectory_bytes=TRAJECTORY_BYTES,
    )
