"""Fused operations. Each lives in the module of its name, beside ``<op>_reference``, its plain-PyTorch definition."""

# Registers operators' CUDA implementations.
from ikem_fast.ops import _queue_tiles as _queue_tiles
from ikem_fast.ops import _temporal_convolution_cuda as _temporal_convolution_cuda
from ikem_fast.ops.augment import (
    AugmentationConfig,
    AugmentationParameters,
    augment,
    camera_view,
    draw_augmentation,
    motion_scale,
    shear,
    temporal_crop,
)
from ikem_fast.ops.batch_norm_coefficients import batch_norm_coefficients, batch_norm_coefficients_reference
from ikem_fast.ops.clip_views import ClipViews, clip_views, clip_views_reference
from ikem_fast.ops.context_loss import context_loss, context_loss_and_accuracy, context_loss_reference
from ikem_fast.ops.derive_modalities import derive_modalities, derive_modalities_reference
from ikem_fast.ops.draw_views import ViewParameters, draw_views, draw_views_reference
from ikem_fast.ops.enqueue import enqueue_, enqueue_reference_
from ikem_fast.ops.exchange_loss import exchange_loss, exchange_loss_and_accuracy, exchange_loss_reference
from ikem_fast.ops.graph_convolution import graph_convolution, graph_convolution_reference, graph_edges
from ikem_fast.ops.info_nce import info_nce, info_nce_and_accuracy, info_nce_reference
from ikem_fast.ops.momentum_update import momentum_update_, momentum_update_reference_
from ikem_fast.ops.pair_log_sum_exp import PairLogSumExp, pair_log_sum_exp, pair_log_sum_exp_reference
from ikem_fast.ops.queue_log_sum_exp import queue_log_sum_exp, queue_log_sum_exp_reference
from ikem_fast.ops.relational_distillation_loss import (
    relational_distillation_loss,
    relational_distillation_loss_reference,
)
from ikem_fast.ops.residual_activation import residual_activation, residual_activation_reference
from ikem_fast.ops.sharded_queue import gather_queue, own_columns, queue_columns
from ikem_fast.ops.temporal_convolution import temporal_convolution, temporal_convolution_reference

__all__ = [
    "AugmentationConfig",
    "AugmentationParameters",
    "ClipViews",
    "PairLogSumExp",
    "ViewParameters",
    "augment",
    "batch_norm_coefficients",
    "batch_norm_coefficients_reference",
    "camera_view",
    "clip_views",
    "clip_views_reference",
    "context_loss",
    "context_loss_and_accuracy",
    "context_loss_reference",
    "derive_modalities",
    "derive_modalities_reference",
    "draw_augmentation",
    "draw_views",
    "draw_views_reference",
    "enqueue_",
    "enqueue_reference_",
    "exchange_loss",
    "exchange_loss_and_accuracy",
    "exchange_loss_reference",
    "gather_queue",
    "graph_convolution",
    "graph_convolution_reference",
    "graph_edges",
    "info_nce",
    "info_nce_and_accuracy",
    "info_nce_reference",
    "momentum_update_",
    "momentum_update_reference_",
    "motion_scale",
    "own_columns",
    "pair_log_sum_exp",
    "pair_log_sum_exp_reference",
    "queue_columns",
    "queue_log_sum_exp",
    "queue_log_sum_exp_reference",
    "relational_distillation_loss",
    "relational_distillation_loss_reference",
    "residual_activation",
    "residual_activation_reference",
    "shear",
    "temporal_convolution",
    "temporal_convolution_reference",
    "temporal_crop",
]
