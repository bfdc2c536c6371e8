"""The losses as modules: each holds its options and calls one function of gclkern.functional.

base.py          what losses of cosines or features share
gcl.py           GCL, of cosines and of features
logits.py        LDAM, logit adjustment, label-aware smoothing, CosFace, focal loss
angular.py       margins that add to an angle: ArcFace, AGCL, DBM
contrastive.py   softmax over samples and prototypes: SupCon, BCL, PSC
proco.py         softmax over distributions: ProCo
dro_lt.py        the DRO-LT bound
"""

from gclkern.losses.angular import AGCLLoss, ArcFaceLoss, DBMLoss
from gclkern.losses.contrastive import BalancedContrastiveLoss, PrototypicalContrastiveLoss, SupConLoss
from gclkern.losses.dro_lt import DROLTLoss
from gclkern.losses.gcl import GCLLoss, LinearGCLLoss
from gclkern.losses.logits import CosFaceLoss, FocalLoss, LabelAwareSmoothingLoss, LDAMLoss, LogitAdjustedLoss
from gclkern.losses.proco import ProCoLoss

__all__ = [
    "AGCLLoss",
    "ArcFaceLoss",
    "BalancedContrastiveLoss",
    "CosFaceLoss",
    "DBMLoss",
    "DROLTLoss",
    "FocalLoss",
    "GCLLoss",
    "LDAMLoss",
    "LabelAwareSmoothingLoss",
    "LinearGCLLoss",
    "LogitAdjustedLoss",
    "ProCoLoss",
    "PrototypicalContrastiveLoss",
    "SupConLoss",
]
