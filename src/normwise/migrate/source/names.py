"""What the names of TensorFlow Addons are called now: here, in Keras 3, or nowhere."""

from typing import NamedTuple

OLD_PACKAGE, NEW_PACKAGE = "tensorflow_addons", "normwise"
REGISTERED = "Addons>"  # before the names that its layers have in saved models


class Successor(NamedTuple):
    """What replaces a name of TensorFlow Addons.

    Args:
        name: what to use now, as `normwise.layers.TLU` or `keras.optimizers.Lamb`; None if neither
            package has it.
        note: what differs, or what to do instead; may be empty.
    """

    name: str | None
    note: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether a reference can be rewritten: same arguments, same defaults."""
        return self.name is not None and self.name.startswith("normwise.")


# The modules that define what normwise has. People import from these, too.
_HOMES = {
    "layers.normalizations": (
        "FilterResponseNormalization",
        "GroupNormalization",
        "InstanceNormalization",
    ),
    "layers.spectral_normalization": ("SpectralNormalization",),
    "layers.tlu": ("TLU",),
    "layers.wrappers": ("WeightNormalization",),
    "rnn.layer_norm_lstm_cell": ("LayerNormLSTMCell",),
    "rnn.layer_norm_simple_rnn_cell": ("LayerNormSimpleRNNCell",),
}

_MOVED_NOTES = {
    "SpectralNormalization": "compatible=True trains by the old arithmetic",
    "WeightNormalization": "only a call in training takes its data to initialize",
}
MOVED = {
    f"{package}.{name}": Successor(f"normwise.{package}.{name}", _MOVED_NOTES.get(name, ""))
    for package, names in ((home.partition(".")[0], names) for home, names in _HOMES.items())
    for name in names
}

# An import of one of these that nothing refers to is there to register layers; normwise's does so.
REGISTERING_MODULES = frozenset({"", "layers", "rnn", *_HOMES})

_ADAPTIVE = Successor("", "the same arguments; in Keras 3.15, not in 3.12")
_DECAY = "pass weight_decay divided by the learning rate, which Keras multiplies it by"
_PAIRS = "a loss over the pairs of a batch"
_SCIPY_RANKS = "scipy.stats has it for arrays"
_TRANSFORM = "pass the eight numbers of the projective transform; Keras takes affine ones only"

IN_KERAS = {
    "activations.gelu": Successor(
        "keras.activations.gelu", "pass approximate=True, which was the default"
    ),
    "activations.hardshrink": Successor(
        "keras.activations.hard_shrink", "threshold= for upper= and -lower="
    ),
    "activations.mish": Successor("keras.activations.mish"),
    "activations.softshrink": Successor(
        "keras.activations.soft_shrink", "threshold= for upper= and -lower="
    ),
    "activations.sparsemax": Successor("keras.activations.sparsemax"),
    "activations.tanhshrink": Successor("keras.activations.tanh_shrink"),
    "callbacks.AverageModelCheckpoint": Successor(
        "keras.callbacks.SwapEMAWeights",
        "an optimizer with use_ema=True, and a ModelCheckpoint after it",
    ),
    "image.cutout": Successor("keras.layers.RandomErasing", "at random places only"),
    "image.equalize": Successor("keras.layers.Equalization"),
    "image.gaussian_filter2d": Successor("keras.ops.image.gaussian_blur", "kernel_size="),
    "image.interpolate_bilinear": Successor(
        "keras.ops.image.map_coordinates", "order=1, coordinates first"
    ),
    "image.random_cutout": Successor("keras.layers.RandomErasing"),
    "image.resampler": Successor("keras.ops.image.map_coordinates", "order=1, coordinates first"),
    "image.rotate": Successor(
        "keras.ops.image.affine_transform", "keras.layers.RandomRotation for random angles"
    ),
    "image.sharpness": Successor("keras.layers.RandomSharpness", "of random strength only"),
    "image.shear_x": Successor(
        "keras.ops.image.affine_transform", "keras.layers.RandomShear for random shears"
    ),
    "image.shear_y": Successor(
        "keras.ops.image.affine_transform", "keras.layers.RandomShear for random shears"
    ),
    "image.transform": Successor("keras.ops.image.affine_transform", _TRANSFORM),
    "image.translate": Successor(
        "keras.ops.image.affine_transform", "keras.layers.RandomTranslation for random distances"
    ),
    "image.translate_xy": Successor(
        "keras.ops.image.affine_transform", "keras.layers.RandomTranslation for random distances"
    ),
    **{
        f"layers.Adaptive{kind}Pooling{rank}D": _ADAPTIVE._replace(
            name=f"keras.layers.Adaptive{kind}Pooling{rank}D"
        )
        for kind in ("Average", "Max")
        for rank in (1, 2, 3)
    },
    "layers.GELU": Successor(
        "keras.layers.Activation", 'Activation("gelu") is exact; the old default was approximate'
    ),
    "layers.MultiHeadAttention": Successor(
        "keras.layers.MultiHeadAttention",
        "key_dim= for head_size=, and query, value, key as arguments of the call; other weights",
    ),
    "layers.Sparsemax": Successor("keras.layers.Activation", 'Activation("sparsemax")'),
    "losses.SigmoidFocalCrossEntropy": Successor(
        "keras.losses.BinaryFocalCrossentropy",
        "pass apply_class_balancing=True; a mean over the last axis and the batch, "
        "where it was a sum and no reduction",
    ),
    "losses.sigmoid_focal_crossentropy": Successor(
        "keras.losses.binary_focal_crossentropy",
        "pass apply_class_balancing=True; a mean over the last axis, where it was a sum",
    ),
    "metrics.F1Score": Successor("keras.metrics.F1Score", "without num_classes="),
    "metrics.FBetaScore": Successor("keras.metrics.FBetaScore", "without num_classes="),
    "metrics.MeanMetricWrapper": Successor("keras.metrics.MeanMetricWrapper"),
    "metrics.PearsonsCorrelation": Successor(
        "keras.metrics.PearsonCorrelation",
        "of each sample along an axis, averaged; it was of the whole stream",
    ),
    "metrics.RSquare": Successor("keras.metrics.R2Score", "class_aggregation= for multioutput="),
    "optimizers.AdamW": Successor("keras.optimizers.AdamW", f"learning_rate comes first; {_DECAY}"),
    "optimizers.DecoupledWeightDecayExtension": Successor(
        "keras.optimizers.Optimizer", f"every optimizer takes weight_decay=; {_DECAY}"
    ),
    "optimizers.LAMB": Successor(
        "keras.optimizers.Lamb", "exclude_from_weight_decay is a method; epsilon was 1e-6"
    ),
    "optimizers.LazyAdam": Successor(
        "keras.optimizers.Adam", "which updates every row of an embedding"
    ),
    "optimizers.MovingAverage": Successor(
        "keras.optimizers.Optimizer", "every optimizer takes use_ema=True, ema_momentum="
    ),
    "optimizers.MultiOptimizer": Successor(
        "keras.optimizers.MultiOptimizer", "an OptimizerMap for the list; not in Keras 3.12"
    ),
    "optimizers.SGDW": Successor("keras.optimizers.SGD", f"learning_rate comes first; {_DECAY}"),
    "optimizers.extend_with_decoupled_weight_decay": Successor(
        "keras.optimizers.Optimizer", f"every optimizer takes weight_decay=; {_DECAY}"
    ),
    "seq2seq.BahdanauAttention": Successor(
        "keras.layers.AdditiveAttention", "without the memory; pass query and value to the call"
    ),
    "seq2seq.LuongAttention": Successor(
        "keras.layers.Attention", "without the memory; pass query and value to the call"
    ),
    "seq2seq.SequenceLoss": Successor(
        "keras.losses.SparseCategoricalCrossentropy",
        "from_logits=True, and the weights as sample_weight",
    ),
    "seq2seq.sequence_loss": Successor(
        "keras.losses.sparse_categorical_crossentropy", "from_logits=True; weight the result"
    ),
}

NOWHERE = {
    "__version__": "",
    "activations.lisht": "x * keras.ops.tanh(x)",
    "activations.rrelu": "keras.activations.leaky_relu, without its random slopes, is near",
    "activations.snake": "x + keras.ops.sin(frequency * x) ** 2 / frequency",
    "callbacks.TQDMProgressBar": "tqdm.keras.TqdmCallback of the package tqdm is near",
    "callbacks.TimeStopping": "",
    "image.adjust_hsv_in_yiq": "",
    "image.angles_to_projective_transforms": "",
    "image.blend": "image1 + factor * (image2 - image1)",
    "image.compose_transforms": "",
    "image.connected_components": "scipy.ndimage.label has it for arrays",
    "image.dense_image_warp": "keras.ops.image.map_coordinates of the grid less the flow",
    "image.euclidean_dist_transform": "scipy.ndimage.distance_transform_edt has it for arrays",
    "image.interpolate_spline": "scipy.interpolate.RBFInterpolator has it for arrays",
    "image.mean_filter2d": "keras.ops.average_pool with strides=1, after keras.ops.pad",
    "image.median_filter2d": "scipy.ndimage.median_filter has it for arrays",
    "image.random_hsv_in_yiq": "keras.layers.RandomColorJitter is near",
    "image.sparse_image_warp": "",
    "image.translations_to_projective_transforms": "",
    "layers.CRF": "",
    "layers.CorrelationCost": "",
    "layers.ESN": "",
    "layers.EmbeddingBag": "keras.layers.Embedding, and a sum",
    "layers.MaxUnpooling2D": "",
    "layers.MaxUnpooling2DV2": "",
    "layers.Maxout": "keras.layers.Reshape, and keras.ops.max",
    "layers.NoisyDense": "",
    "layers.PoincareNormalize": "",
    "layers.PolynomialCrossing": "",
    "layers.Snake": "x + keras.ops.sin(frequency * x) ** 2 / frequency",
    "layers.SpatialPyramidPooling2D": "keras.layers.AdaptiveAveragePooling2D of each size",
    "layers.StochasticDepth": "",
    "losses.ContrastiveLoss": _PAIRS,
    "losses.GIoULoss": "",
    "losses.LiftedStructLoss": _PAIRS,
    "losses.NpairsLoss": _PAIRS,
    "losses.NpairsMultilabelLoss": _PAIRS,
    "losses.PinballLoss": "the mean of keras.ops.maximum(tau * d, (tau - 1) * d), d = true - pred",
    "losses.SparsemaxLoss": "",
    "losses.TripletHardLoss": _PAIRS,
    "losses.TripletSemiHardLoss": _PAIRS,
    "losses.WeightedKappaLoss": "",
    "losses.contrastive_loss": _PAIRS,
    "losses.giou_loss": "",
    "losses.lifted_struct_loss": _PAIRS,
    "losses.npairs_loss": _PAIRS,
    "losses.npairs_multilabel_loss": _PAIRS,
    "losses.pinball_loss": "the mean of keras.ops.maximum(tau * d, (tau - 1) * d), d = true - pred",
    "losses.sparsemax_loss": "",
    "losses.triplet_hard_loss": _PAIRS,
    "losses.triplet_semihard_loss": _PAIRS,
    "metrics.CohenKappa": "sklearn.metrics.cohen_kappa_score has it for arrays",
    "metrics.GeometricMean": "",
    "metrics.HammingLoss": "for several labels it is 1 - keras.metrics.BinaryAccuracy",
    "metrics.HarmonicMean": "",
    "metrics.KendallsTauB": _SCIPY_RANKS,
    "metrics.KendallsTauC": _SCIPY_RANKS,
    "metrics.MatthewsCorrelationCoefficient": "sklearn.metrics.matthews_corrcoef, for arrays",
    "metrics.MultiLabelConfusionMatrix": "sklearn.metrics.multilabel_confusion_matrix, for arrays",
    "metrics.SpearmansRank": _SCIPY_RANKS,
    "metrics.hamming_distance": "",
    "metrics.hamming_loss_fn": "",
    "optimizers.AdaBelief": "",
    "optimizers.AveragedOptimizerWrapper": "",
    "optimizers.COCOB": "",
    "optimizers.ConditionalGradient": "",
    "optimizers.CyclicalLearningRate": "keras.optimizers.schedules.LearningRateSchedule to derive",
    "optimizers.ExponentialCyclicalLearningRate": "as CyclicalLearningRate",
    "optimizers.KerasLegacyOptimizer": "",
    "optimizers.Lookahead": "",
    "optimizers.NovoGrad": "",
    "optimizers.ProximalAdagrad": "",
    "optimizers.RectifiedAdam": "keras.optimizers.AdamW with a warm-up is near",
    "optimizers.SWA": "use_ema=True of every optimizer is near",
    "optimizers.Triangular2CyclicalLearningRate": "as CyclicalLearningRate",
    "optimizers.TriangularCyclicalLearningRate": "as CyclicalLearningRate",
    "optimizers.Yogi": "",
    "options": "remove it: normwise has no kernels to turn off so; see docs/kernels.md",
    "register_all": "remove it: importing normwise registers its layers",
    "rnn.ESNCell": "",
    "rnn.NASCell": "",
    "rnn.PeepholeLSTMCell": "",
    **dict.fromkeys(
        (
            *("seq2seq.AttentionMechanism", "seq2seq.AttentionWrapper"),
            *("seq2seq.AttentionWrapperState", "seq2seq.BahdanauMonotonicAttention"),
            *("seq2seq.BaseDecoder", "seq2seq.BasicDecoder", "seq2seq.BasicDecoderOutput"),
            *("seq2seq.BeamSearchDecoder", "seq2seq.BeamSearchDecoderOutput"),
            *("seq2seq.BeamSearchDecoderState", "seq2seq.CustomSampler", "seq2seq.Decoder"),
            *("seq2seq.FinalBeamSearchDecoderOutput", "seq2seq.GreedyEmbeddingSampler"),
            *("seq2seq.InferenceSampler", "seq2seq.LuongMonotonicAttention"),
            *("seq2seq.SampleEmbeddingSampler", "seq2seq.Sampler"),
            *("seq2seq.ScheduledEmbeddingTrainingSampler", "seq2seq.dynamic_decode"),
            *("seq2seq.ScheduledOutputTrainingSampler", "seq2seq.TrainingSampler"),
            *("seq2seq.gather_tree", "seq2seq.gather_tree_from_array", "seq2seq.hardmax"),
            *("seq2seq.monotonic_attention", "seq2seq.safe_cumprod", "seq2seq.tile_batch"),
            *("text.CRFModelWrapper", "text.CrfDecodeForwardRnnCell", "text.crf_binary_score"),
            *("text.crf_constrained_decode", "text.crf_decode", "text.crf_decode_backward"),
            *("text.crf_decode_forward", "text.crf_filtered_inputs", "text.crf_forward"),
            *("text.crf_log_likelihood", "text.crf_log_norm", "text.crf_multitag_sequence_score"),
            *("text.crf_sequence_score", "text.crf_unary_score", "text.parse_time"),
            *("text.skip_gram_sample", "text.skip_gram_sample_with_text_vocab"),
            *("text.viterbi_decode", "types"),
        ),
        "",
    ),
}

_SUCCESSORS = MOVED | IN_KERAS | {old: Successor(None, note) for old, note in NOWHERE.items()}


MODULES = REGISTERING_MODULES | {old.partition(".")[0] for old in _SUCCESSORS if "." in old}


def successor(path: str) -> Successor | None:
    """What replaces `path`, a name below the old package; None for what is no name of its.

    >>> successor("layers.TLU")
    Successor(name='normwise.layers.TLU', note='')
    >>> successor("layers.tlu.TLU") == successor("layers.TLU")
    True
    """
    parts = path.split(".")
    if len(parts) == 3:
        # By the module that defines it, as no attribute of a class is called like another name.
        path = f"{parts[0]}.{parts[2]}"
    return _SUCCESSORS.get(path)


def registered(name: str) -> Successor | None:
    """What replaces the object that saved models call `Addons>name`.

    >>> registered("LAMB").name
    'keras.optimizers.Lamb'
    """
    found = (each for old, each in _SUCCESSORS.items() if old.rpartition(".")[2] == name)
    return next(found, None)
