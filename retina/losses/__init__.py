"""The loss family, for detectors and for any other model. Names are looked up when they are used."""

from retina._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "detection": ["DetectionLoss"],
        "focal": ["SigmoidFocalLoss", "SoftmaxFocalLoss", "sigmoid_focal_loss", "softmax_focal_loss"],
        "soft_targets": [
            *("QualityFocalLoss", "VarifocalLoss", "GHMLoss", "DistributionFocalLoss"),
            *("quality_focal_loss", "varifocal_loss", "ghm_loss", "distribution_focal_loss"),
        ],
        "dice": ["SigmoidDiceLoss", "SoftmaxDiceLoss", "FocalPlusDiceLoss", "sigmoid_dice_loss", "softmax_dice_loss"],
        "balance": ["OHEMLoss", "class_balanced_weights", "hardest", "hardest_negatives"],
        "common": ["FromSigmoid", "FromSoftmax"],
    },
)
