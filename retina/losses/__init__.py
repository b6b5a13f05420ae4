"""The loss family, for detectors and for any other model. Names are looked up when they are used."""

from typing import TYPE_CHECKING

from retina._lazy import lazy

if TYPE_CHECKING:
    from retina.losses.balance import OHEMLoss as OHEMLoss
    from retina.losses.balance import class_balanced_weights as class_balanced_weights
    from retina.losses.balance import hardest as hardest
    from retina.losses.balance import hardest_negatives as hardest_negatives
    from retina.losses.common import FromSigmoid as FromSigmoid
    from retina.losses.common import FromSoftmax as FromSoftmax
    from retina.losses.detection import DetectionLoss as DetectionLoss
    from retina.losses.dice import FocalPlusDiceLoss as FocalPlusDiceLoss
    from retina.losses.dice import SigmoidDiceLoss as SigmoidDiceLoss
    from retina.losses.dice import SoftmaxDiceLoss as SoftmaxDiceLoss
    from retina.losses.dice import sigmoid_dice_loss as sigmoid_dice_loss
    from retina.losses.dice import softmax_dice_loss as softmax_dice_loss
    from retina.losses.focal import SigmoidFocalLoss as SigmoidFocalLoss
    from retina.losses.focal import SoftmaxFocalLoss as SoftmaxFocalLoss
    from retina.losses.focal import sigmoid_focal_loss as sigmoid_focal_loss
    from retina.losses.focal import softmax_focal_loss as softmax_focal_loss
    from retina.losses.soft_targets import DistributionFocalLoss as DistributionFocalLoss
    from retina.losses.soft_targets import GHMLoss as GHMLoss
    from retina.losses.soft_targets import QualityFocalLoss as QualityFocalLoss
    from retina.losses.soft_targets import VarifocalLoss as VarifocalLoss
    from retina.losses.soft_targets import distribution_focal_loss as distribution_focal_loss
    from retina.losses.soft_targets import ghm_loss as ghm_loss
    from retina.losses.soft_targets import quality_focal_loss as quality_focal_loss
    from retina.losses.soft_targets import varifocal_loss as varifocal_loss
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
