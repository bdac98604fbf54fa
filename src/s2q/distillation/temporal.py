"""The loss on the similarities of frames: Q-VDiT's temporal maintenance distillation (TMD).

    R = softmax over j of cos(x_i, x_j),    L = (1/f²) Σ_i KL(R_teacher,i ‖ R_student,i)

(Feng et al., "Q-VDiT: Towards Accurate Quantization and Distillation of Video-Generation Diffusion Transformers", 2025,
section 3.3.) x_i is all that a block returns for the tokens of frame i, as one vector.

Example, two frames: orthogonal at the teacher, R_i = [e, 1] / (e + 1) = [0.731, 0.269] and its mirror image; equal at
the student, R_i = [½, ½]. Each row has KL = 0.731 ln 1.462 + 0.269 ln 0.538 = 0.111, so that L = 2 · 0.111 / 4 = 0.055.

Legend: `B` samples, `f` frames, `N` video tokens, `d` channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.common.errors import InvalidInputError


def temporal_loss(student: Tensor, teacher: Tensor, *, frames: int) -> Tensor:
    """Compute how far the similarities of a student's frames are from those of the teacher's, fp32 scalar.

    Args:
        student: The video stream of a block, [B, N, d], frame by frame; differentiable.
        teacher: The same of the full-precision block; no gradient goes there.

    Raises:
        InvalidInputError: If the shapes differ, or N is not a multiple of f.
    """
    if student.shape != teacher.shape or student.ndim != 3 or frames < 1 or student.shape[1] % frames:
        raise InvalidInputError(
            f"temporal loss: got {list(student.shape)} and {list(teacher.shape)} of {frames} frames; expected "
            "[B, N, d] twice, N a multiple of the frames"
        )
    student_R, teacher_R = _log_relations(student, frames), _log_relations(teacher.detach(), frames)
    return F.kl_div(student_R, teacher_R, reduction="none", log_target=True).mean().float()


def _log_relations(video: Tensor, frames: int) -> Tensor:
    """Logarithms of R, fp64 [B, f, f].

    In fp32 the rounding of probabilities, 6e-8 of each, would show in the divergence of nearly equal rows.
    """
    features = F.normalize(video.float().reshape(len(video), frames, -1), dim=-1)
    return torch.log_softmax((features @ features.transpose(1, 2)).double(), dim=-1)
