// The geometry of a norm, as src/normwise/geometry.py has it: the same names, the same errors. A shape
// is an array of numbers, null for an extent that is not known before the call. An axis or a number of
// groups is a number, an axis also an array, and what is neither in Python is {repr: "1.5"}.
// tests/test_site_shares.py holds all of it against Python.
'use strict';

globalThis.normwiseGeometry = (() => {
  const INSTANCE = -1;

  class PythonError extends Error {
    constructor(type, message) {
      super(message);
      this.type = type;
    }
  }

  const valueError = (message) => new PythonError('ValueError', message);
  const typeError = (message) => new PythonError('TypeError', message);

  // A value as Python prints it.
  function repr(value) {
    if (value === null) return 'None';
    if (Array.isArray(value)) return `[${value.map(repr).join(', ')}]`;
    return typeof value === 'number' ? String(value) : value.repr;
  }

  function tuple(values) {
    return values.length === 1 ? `(${repr(values[0])},)` : `(${values.map(repr).join(', ')})`;
  }

  function range(from, to) {
    return Array.from({length: Math.max(0, to - from)}, (_, i) => from + i);
  }

  function product(extents) {
    return extents.includes(null) ? null : extents.reduce((a, b) => a * b, 1);
  }

  const ascending = (a, b) => a - b;

  // The norms: each returns a geometry or throws what Python raises.

  function group(shape, axis, groups) {
    const channel = checkChannelAxis(axis);
    checkRank(shape);
    return groupOf(shape, channel, checkGroups(groups));
  }

  function response(shape, axis) {
    const axes = checkSpatialAxes(axis);
    checkRank(shape);
    return groupOf(shape, channelBeside(axes, shape), INSTANCE);
  }

  function layer(shape, axis) {
    const axes = [checkAxes(axis)].flat();
    checkRank(shape);
    const set = canonical(axes, shape);
    const kept = range(0, shape.length).filter((a) => !set.includes(a));
    const first = set[0];
    const end = set[set.length - 1] + 1;
    if (end - first === set.length) {
      const per = end < shape.length ? ['outer', 'after'] : ['outer'];
      return geometry(shape, [first, first, end], 1, per);
    }
    const ends = [kept.length, kept.length, shape.length];
    return geometry(shape, ends, 1, ['outer'], [...kept, ...set]);
  }

  function batch(shape, axis) {
    checkRank(shape);
    const [channel] = canonical([checkChannelAxis(axis)], shape);
    return geometry(shape, [0, channel, channel + 1], shape[channel], ['groups']);
  }

  function reversible(shape, axis) {
    const time = checkAxes(axis);
    if (![1, 2, -1, -2].includes(time)) {
      throw valueError(
        `axis=${repr(axis)} is no time axis of a series; use axis=1 for (batch, time, features), ` +
          'axis=2 for (batch, features, time)');
    }
    if (shape.length !== 3) {
      throw valueError(
        `shape ${tuple(shape)} has rank ${shape.length}, but a series is of shape ` +
          '(batch, time, features); give it an axis for each, as in x[..., None]');
    }
    return group(shape, time === 1 || time === -2 ? 2 : 1, INSTANCE);
  }

  function spade(shape, axis) {
    if (shape.length !== 4) {
      throw valueError(
        `x has shape ${tuple(shape)}, but SPADE takes images and maps of rank 4; ` +
          'make labels a channel each, as by keras.ops.one_hot');
    }
    return group(shape, axis, INSTANCE);
  }

  function groupOf(shape, axis, groups) {
    const [channel] = canonical([axis], shape);
    if (channel === 0) throw batchAxisError(axis, shape);
    const channels = shape[channel];
    if (channels === null) {
      throw valueError(
        `the number of channels on axis ${axis} of shape ${tuple(shape)} is unknown; give that ` +
          'axis a fixed extent, as in keras.Input((None, None, 16))');
    }
    const count = groups === INSTANCE ? channels : groups;
    if (groups !== INSTANCE && (count > channels || channels % count)) {
      const wrong = count > channels ? 'is more than' : 'does not divide';
      throw valueError(
        `groups=${groups} ${wrong} the ${channels} channels on axis ${axis} of shape ` +
          `${tuple(shape)}; use ${choices(channels ? divisors(channels) : [INSTANCE])}`);
    }
    return geometry(shape, [1, channel, channel + 1], count, ['outer', 'groups']);
  }

  function channelBeside(axes, shape) {
    const rank = shape.length;
    if (axes.length !== rank - 2) {
      const last = range(1, rank - 1);
      const remedy = last.length
        ? `${repr(last)} for channels last, axis=${repr(range(2, rank))} for channels first`
        : '[]';
      throw valueError(
        `axis=${repr(axes)} is to name every axis of shape ${tuple(shape)} but the batch and the ` +
          `channels, ${rank - 2} of them; use axis=${remedy}`);
    }
    const spatial = canonical(axes, shape);
    if (spatial.includes(0)) throw batchAmongSpatialError(axes, shape);
    return range(1, rank).find((axis) => !spatial.includes(axis));
  }

  // The checks of arguments.

  function checkGroups(groups) {
    if (typeof groups !== 'number' || (groups < 1 && groups !== INSTANCE)) {
      throw valueError(
        `groups=${repr(groups)} is no number of groups; ` +
          'expected a positive int, or -1 for one group per channel (instance norm)');
    }
    return groups;
  }

  function checkAxes(axis) {
    if (Array.isArray(axis) && !axis.length) {
      throw valueError('axis=[] names no axis; name at least one, as in axis=-1');
    }
    if ([axis].flat().some((each) => typeof each !== 'number')) {
      throw typeError(`axis=${repr(axis)} is no axis; expected an int, or a list or tuple of ints`);
    }
    return axis;
  }

  function checkChannelAxis(axis) {
    const axes = [checkAxes(axis)].flat();
    if (axes.length !== 1) {
      throw valueError(
        `axis=${repr(axes)} names ${axes.length} axes, but the channels lie on one; use ` +
          `axis=${axes[axes.length - 1]}, or layer norm to normalize over several axes`);
    }
    if (axes[0] === 0) throw batchAxisError(0, null);
    return axes[0];
  }

  function checkSpatialAxes(axis) {
    if (Array.isArray(axis) && !axis.length) return [];
    const axes = [checkAxes(axis)].flat();
    if (axes.includes(0)) throw batchAmongSpatialError(axes, null);
    return axes;
  }

  function checkRank(shape) {
    if (shape.length < 2) {
      throw valueError(
        `shape ${tuple(shape)} has rank ${shape.length}, but a norm needs a batch axis and at ` +
          'least one more; add an axis, as in x[None, :]');
    }
  }

  // The axes counted from the front, ascending.
  function canonical(axes, shape) {
    const rank = shape.length;
    for (const axis of axes) {
      if (axis < -rank || axis >= rank) {
        throw valueError(
          `axis=${axis} is out of range for shape ${tuple(shape)} of rank ${rank}; ` +
            `use an axis from ${-rank} to ${rank - 1}`);
      }
    }
    const sorted = axes.map((axis) => (axis + rank) % rank).sort(ascending);
    const twice = sorted.find((axis, i) => axis === sorted[i + 1]);
    if (twice !== undefined) {
      throw valueError(
        `axis=${repr(axes)} names axis ${twice} of shape ${tuple(shape)} twice; name each axis once`);
    }
    return sorted;
  }

  const ofShape = (shape) => (shape === null ? '' : ` of shape ${tuple(shape)}`);

  function batchAxisError(axis, shape) {
    return valueError(
      `axis=${axis} is the batch axis${ofShape(shape)}, and group and instance norm keep samples ` +
        'apart; use the channel axis: -1 for channels last, 1 for channels first');
  }

  function batchAmongSpatialError(axes, shape) {
    return valueError(
      `axis=${repr(axes)} names the batch axis${ofShape(shape)}, and filter response norm keeps ` +
        'samples apart; name the spatial axes only: [1, 2] for images with channels last');
  }

  function divisors(number) {
    const end = Math.min(Math.floor(Math.sqrt(number)), 4096) + 1;
    const small = range(1, end).filter((d) => number % d === 0);
    return [...new Set([...small, ...small.map((d) => number / d)])].sort(ascending);
  }

  function choices(numbers) {
    const most = numbers.slice(0, -1);
    const last = numbers[numbers.length - 1];
    return most.length ? `${most.join(', ')} or ${last}` : String(last);
  }

  // What follows from the axes of the five extents.

  function geometry(shape, ends, groups, per, permutation = null) {
    const order = permutation || range(0, shape.length);
    const places = [0, ...ends, shape.length];
    const [outer, before, channels, after] = range(0, 4).map((part) =>
      order.slice(places[part], places[part + 1]));
    const extent = (axes) => product(axes.map((axis) => shape[axis]));
    const keepsAfter = per.includes('after');
    const setAxes = [
      ...before,
      ...(per.includes('outer') ? [] : outer),
      ...(per.includes('groups') && groups !== 1 ? [] : channels),
      ...(keepsAfter ? [] : after),
    ].sort(ascending);
    const members = membersOf(extent(channels), groups);
    const extents = {
      outer: extent(outer), before: extent(before), groups, members, after: extent(after),
    };
    const inside = Object.keys(extents).filter((name) => !per.includes(name));
    const kept = keepsAfter ? shape.slice(ends[2]) : [groups];
    return {
      shape,
      ends,
      per,
      extents,
      permutation,
      keepsAfter,
      setAxes,
      parameterAxes: channels,
      parameterShape: channels.map((axis) => shape[axis]),
      // Of sets that are not neighbouring axes no kernel keeps statistics.
      statisticsShape: permutation ? null : [...shape.slice(0, ends[0]), 2, ...kept],
      broadcastStatisticsShape: shape.map((e, axis) => (setAxes.includes(axis) ? 1 : e)),
      setSize: product(inside.map((name) => extents[name])),
      setCount: product(per.map((name) => extents[name])),
      pattern: patternOf(extents, keepsAfter, permutation),
    };
  }

  function membersOf(channels, groups) {
    if (groups === channels) return 1;
    return channels !== null && groups ? channels / groups : null;
  }

  function patternOf({before, after}, keepsAfter, permutation) {
    if (permutation) return null;
    if (after !== 1) return keepsAfter ? 'kept' : 'runs';
    return before === 1 ? 'rows' : 'columns';
  }

  // The set of an element: equal arrays mean one set.
  function setOf(sets, position) {
    return setPlaces(sets).map(({axis, members}) => Math.floor(position[axis] / members));
  }

  // The axes that tell sets apart, and how many indices on each are of one set.
  function setPlaces(sets) {
    return range(0, sets.shape.length)
      .filter((axis) => !sets.setAxes.includes(axis))
      .map((axis) => ({
        axis,
        members: sets.parameterAxes.includes(axis) ? sets.extents.members || 1 : 1,
      }));
  }

  // The sets in the order of their first elements, counted from 0.
  function setNumber(sets, position) {
    return setPlaces(sets).reduce(
      (number, {axis, members}) =>
        number * (sets.shape[axis] / members) + Math.floor(position[axis] / members),
      0);
  }

  function firstOfSet(sets, number) {
    const position = sets.shape.map(() => 0);
    for (const {axis, members} of setPlaces(sets).reverse()) {
      const count = sets.shape[axis] / members;
      position[axis] = (number % count) * members;
      number = Math.floor(number / count);
    }
    return position;
  }

  // The files of kernels that a geometry gets, in csrc/ and in src/normwise/kernels/gpu/.

  const APART = 'the sets are not neighbouring axes';
  const LONGEST_ROW = 4096;
  // The most elements of a row, and of another set, that a program of a GPU holds; and the most of a
  // set that it reads alone.
  const MOST = {forward: {row: 32768, set: 16384}, backward: {row: 8192, set: 8192}};
  const MOST_ALONE = 131072;

  function cpuFile(sets) {
    if (sets.keepsAfter) return 'kept.cc';
    if (sets.pattern === 'rows') {
      return sets.extents.members > LONGEST_ROW ? 'runs.cc' : 'rows.cc';
    }
    return `${sets.pattern}.cc`;
  }

  const powerOf2 = (number) => 2 ** Math.ceil(Math.log2(Math.max(1, number)));

  function gpuFile(sets, pass) {
    const {before, members, after} = sets.extents;
    if (sets.pattern === 'kept') return 'kept.py';
    if (sets.pattern === 'rows') return powerOf2(members) <= MOST[pass].row ? 'rows.py' : 'pieces.py';
    const isColumns = sets.pattern === 'columns';
    const isOneRun = isColumns || before === 1;
    const positions = isColumns ? before : after;
    if (isOneRun && powerOf2(members) * powerOf2(positions) <= MOST[pass].set) return 'whole.py';
    return isOneRun && !isColumns && members * positions <= MOST_ALONE ? 'runs.py' : 'pieces.py';
  }

  // What runs in float32 without a mask: {kernel, reason}, or {kernel, files}, of the forward and the
  // backward pass on a GPU; no files where an extent is not known or empty.
  function onCpu(sets) {
    if (sets.permutation) return {kernel: 'composite', reason: APART};
    return {kernel: 'native', files: product(sets.shape) ? [cpuFile(sets)] : []};
  }

  function onGpu(sets) {
    if (sets.permutation) return {kernel: 'composite', reason: APART};
    if (sets.shape.includes(0)) {
      return {kernel: 'composite', reason: 'x is empty, and no kernel has anything to do'};
    }
    const passes = product(sets.shape) ? ['forward', 'backward'] : [];
    return {kernel: 'triton', files: passes.map((pass) => gpuFile(sets, pass))};
  }

  return {
    INSTANCE, PythonError, repr, tuple, range, product, canonical,
    group, response, layer, batch, reversible, spade,
    setOf, setNumber, firstOfSet, onCpu, onGpu,
  };
})();
