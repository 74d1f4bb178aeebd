// The norms of the page "Who shares statistics?": what each is asked, what is read from a text field,
// and the lines of Python that make it.
'use strict';

globalThis.normwiseNorms = (() => {
  const G = globalThis.normwiseGeometry;

  const NATIVE = {onCpu: G.onCpu, onGpu: G.onGpu};
  const always = (kernel, reason) => ({
    onCpu: () => ({kernel, reason}),
    onGpu: () => ({kernel, reason}),
  });

  // `names` says what the axis of a norm is; `op` is of normwise.ops, with the tensors that it takes.
  const NORMS = {
    group: {
      label: 'group norm',
      names: 'channels',
      hasGroups: true,
      find: (shape, {axis, groups}) => G.group(shape, axis, groups),
      layer: 'normwise.layers.GroupNormalization',
      op: 'group_norm(x, gamma, beta',
      ...NATIVE,
    },
    instance: {
      label: 'instance norm',
      names: 'channels',
      find: (shape, {axis}) => G.group(shape, axis, G.INSTANCE),
      layer: 'normwise.layers.InstanceNormalization',
      op: 'instance_norm(x, gamma, beta',
      ...NATIVE,
    },
    layer: {
      label: 'layer norm',
      names: 'set',
      find: (shape, {axis}) => G.layer(shape, axis),
      layer: 'normwise.layers.LayerNormalization',
      op: 'layer_norm(x, gamma, beta',
      ...NATIVE,
    },
    rms: {
      label: 'RMS norm',
      names: 'set',
      find: (shape, {axis}) => G.layer(shape, axis),
      layer: 'normwise.layers.RMSNormalization',
      op: 'rms_norm(x, gamma',
      note: 'No mean is subtracted: the statistic is the root mean square. There is no beta.',
      ...NATIVE,
    },
    response: {
      label: 'filter response norm',
      names: 'positions',
      find: (shape, {axis}) => G.response(shape, axis),
      layer: 'normwise.layers.FilterResponseNormalization',
      op: 'filter_response_norm(x, gamma, beta',
      note: 'The sets of instance norm, named by their positions. No mean is subtracted: the ' +
        'statistic is the root mean square.',
      ...NATIVE,
    },
    batch: {
      label: 'batch norm (Keras)',
      names: 'channels',
      find: (shape, {axis}) => G.batch(shape, axis),
      layer: 'keras.layers.BatchNormalization',
      note: 'normwise has no batch norm: the line of code is Keras\u2019s own layer. Its sets reach ' +
        'over the samples, as those of no other norm here do by default.',
      ...always('keras', 'the layer is Keras\u2019s'),
    },
    adaptive: {
      label: 'adaptive instance norm',
      names: 'channels',
      find: (shape, {axis}) => G.group(shape, axis, G.INSTANCE),
      layer: 'normwise.layers.AdaptiveInstanceNormalization',
      note: 'The sets of the content, and those of the style alike. In the place of gamma and beta ' +
        'are the deviation and the mean of the style, for each sample.',
      ...NATIVE,
    },
    spade: {
      label: 'SPADE',
      names: 'nothing',
      find: (shape, {channels}) => G.spade(shape, channels === 'first' ? 1 : -1),
      layer: 'normwise.layers.SPADE',
      note: 'The sets of its norm, by default instance norm. In the place of gamma and beta are ' +
        'those that a map gives each element; they are applied after the kernel.',
      ...NATIVE,
    },
    'global-response': {
      label: 'global response norm',
      names: 'channels',
      find: (shape, {axis}) => G.group(shape, axis, G.INSTANCE),
      layer: 'normwise.layers.GlobalResponseNormalization',
      note: 'The statistic is the 2-norm of a set, which is divided by the mean of those of the ' +
        'sample\u2019s channels.',
      ...always('composite', 'it is made of Keras\u2019s operations'),
    },
    reversible: {
      label: 'reversible instance norm',
      names: 'time',
      find: (shape, {axis}) => G.reversible(shape, axis),
      layer: 'normwise.layers.ReversibleInstanceNormalization',
      note: 'Of series: the axis is that of time, and the other one the features, drawn as C.',
      ...NATIVE,
    },
  };

  const AXIS_LABELS = {
    channels: 'Channel axis',
    set: 'Axes of a set',
    positions: 'Position axes',
    time: 'Time axis',
  };

  // A shape of each rank, channels last, with few enough elements to tell apart.
  const PRESETS = {2: [4, 8], 3: [4, 12, 8], 4: [4, 5, 5, 8], 5: [2, 3, 4, 4, 6]};

  function preset(rank, channels) {
    return channels === 'first' ? toFirst(PRESETS[rank]) : PRESETS[rank];
  }

  // A list of something for each axis, whose channels move to the other end.
  function toFirst(list) {
    return [list[0], list[list.length - 1], ...list.slice(1, -1)];
  }

  function toLast(list) {
    return [list[0], ...list.slice(2), list[1]];
  }

  function defaultAxis(norm, rank, channels) {
    const isFirst = channels === 'first';
    if (NORMS[norm].names === 'positions') {
      return isFirst ? G.range(2, rank) : G.range(1, rank - 1);
    }
    if (NORMS[norm].names === 'time') return isFirst ? 2 : 1;
    return isFirst ? 1 : -1;
  }

  // What is typed. A number that Python would not take for an int is its repr.

  function readLiteral(text) {
    if (/^[+-]?\d+$/.test(text)) return Number(text);
    if (/^[+-]?(\d+\.\d*|\.\d+)$/.test(text)) {
      const number = String(Number(text));
      return {repr: number.includes('.') ? number : `${number}.0`};
    }
    if (['True', 'False', 'None'].includes(text)) return {repr: text};
    const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
    return {repr: quote + text.replace(/\\/g, '\\\\').replaceAll(quote, `\\${quote}`) + quote};
  }

  function split(text) {
    const inner = text.trim().replace(/^\((.*)\)$|^\[(.*)\]$/, '$1$2').trim();
    const parts = inner.replace(/,$/, '').split(',').map((part) => part.trim());
    return {inner, parts: inner ? parts : []};
  }

  function readAxis(text) {
    const {inner, parts} = split(text);
    const isList = inner !== text.trim() || inner.includes(',') || !inner;
    return isList ? parts.map(readLiteral) : readLiteral(inner);
  }

  function readShape(text) {
    const {parts} = split(text);
    if (!parts.every((part) => /^\d+$|^None$/.test(part))) {
      throw new G.PythonError(null,
        `shape '${text.trim()}' is no list of extents; write it as in 4, 5, 5, 8`);
    }
    const shape = parts.map((part) => (part === 'None' ? null : Number(part)));
    if (!Number.isSafeInteger(shape.reduce((a, b) => a * Math.max(1, b ?? 1), 1))) {
      throw new G.PythonError(null,
        `shape ${G.tuple(shape)} has more elements than this page counts; give a smaller one`);
    }
    return shape;
  }

  // The sets of what is typed: {shape, axis, groups, channels, sets}, or an error.
  function configure({norm, shape, axis, groups, channels}) {
    const read = {
      shape: readShape(shape), axis: readAxis(axis), groups: readLiteral(groups.trim()), channels,
    };
    return {norm, ...read, sets: NORMS[norm].find(read.shape, read)};
  }

  // The lines of Python.

  function options({norm, axis, groups, channels, sets}) {
    if (norm === 'spade') return [`data_format="channels_${channels}"`];
    // Keras's layer takes no list.
    const named = norm === 'batch' ? sets.parameterAxes[0] : axis;
    const given = [`axis=${G.repr(named)}`];
    return NORMS[norm].hasGroups ? [`groups=${G.repr(groups)}`, ...given] : given;
  }

  function layerLine(configuration) {
    return `${NORMS[configuration.norm].layer}(${options(configuration).join(', ')})`;
  }

  // Null where normwise.ops has none.
  function opLine(configuration) {
    const {op} = NORMS[configuration.norm];
    return op ? `normwise.ops.${op}, ${options(configuration).join(', ')})` : null;
  }

  return {
    NORMS, AXIS_LABELS, preset, toFirst, toLast, defaultAxis, readAxis, readLiteral, readShape,
    configure, layerLine, opLine,
  };
})();
