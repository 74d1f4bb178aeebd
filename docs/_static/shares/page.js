// The page "Who shares statistics?": its controls, its pictures and its address. What is asked stands in
// `state` as it is typed, and all that is shown follows from it.
'use strict';

(() => {
  const G = globalThis.normwiseGeometry;
  const N = globalThis.normwiseNorms;
  const maps = globalThis.normwiseMaps;
  const block = globalThis.normwiseBlock;

  const $ = (id) => document.getElementById(`shares-${id}`);
  const DEFAULTS = {norm: 'group', shape: '4,5,5,8', axis: '-1', groups: '2', channels: 'last'};
  // More could not be told apart.
  const MOST_ELEMENTS = 4096;
  const SPATIAL_NAMES = {0: [], 1: ['L'], 2: ['H', 'W'], 3: ['D', 'H', 'W']};
  const PATTERNS = {
    rows: 'rows: a set is a row of neighbours',
    runs: 'runs: a set is a run of neighbours, or a few',
    columns: 'columns: the neighbours are channels',
    kept: 'kept: the neighbours have a set each',
  };
  const KEYS = {
    ArrowRight: {direction: 'right', step: 1},
    ArrowLeft: {direction: 'right', step: -1},
    ArrowDown: {direction: 'down', step: 1},
    ArrowUp: {direction: 'down', step: -1},
  };

  let state = {...DEFAULTS};
  // The element whose set is shown, and of what is shown: the configuration, the layouts.
  let position = null;
  let shown = null;

  // The address.

  const spaced = (text) => text.replace(/\s*,\s*/g, ', ');
  const dense = (text) => text.replace(/\s+/g, '');

  function readAddress() {
    const given = new URLSearchParams(location.search);
    const norm = given.has('norm') && given.get('norm') in N.NORMS ? given.get('norm') : 'group';
    const channels = given.get('channels') === 'first' ? 'first' : 'last';
    const shape = given.get('shape') ?? (N.NORMS[norm].names === 'time' ? '4,12,8' : DEFAULTS.shape);
    const axis = given.get('axis') ?? defaultAxis(norm, shape, channels);
    state = {norm, shape, axis, groups: given.get('groups') ?? DEFAULTS.groups, channels};
    const at = (given.get('at') ?? '').split(',').map(Number);
    position = at.every(Number.isInteger) ? at : null;
  }

  function address() {
    const {names, hasGroups} = N.NORMS[state.norm];
    const parts = {
      norm: state.norm,
      shape: dense(state.shape),
      axis: names === 'nothing' ? null : dense(state.axis),
      groups: hasGroups ? dense(state.groups) : null,
      channels: state.channels === 'first' ? 'first' : null,
      at: position?.some((index) => index > 0) ? position.join(',') : null,
    };
    const written = Object.entries(parts)
      .filter(([, value]) => value !== null)
      .map(([name, value]) => `${name}=${encodeURIComponent(value).replaceAll('%2C', ',')}`);
    return `?${written.join('&')}${location.hash}`;
  }

  let addressTimer;

  // The element goes into the address when it has come to rest: browsers refuse too many changes.
  function writeElementSoon() {
    clearTimeout(addressTimer);
    addressTimer = setTimeout(() => history.replaceState(null, '', address()), 300);
  }

  function commit() {
    clearTimeout(addressTimer);
    show();
    if (address() !== location.search + location.hash) history.pushState(null, '', address());
  }

  // The controls.

  function rankOf(shape) {
    try {
      return N.readShape(shape).length;
    } catch {
      return null;
    }
  }

  function defaultAxis(norm, shape, channels) {
    return axisText(N.defaultAxis(norm, rankOf(shape) ?? 4, channels));
  }

  const axisText = (axis) => (Array.isArray(axis) && axis.length > 1 ? axis.join(',') : G.repr(axis));

  function chooseNorm(norm) {
    const names = N.NORMS[norm].names;
    const isSame = names === N.NORMS[state.norm].names;
    state.norm = norm;
    if (names === 'time' && rankOf(state.shape) !== 3) chooseRank(3);
    if (norm === 'spade' && rankOf(state.shape) !== 4) chooseRank(4);
    if (!isSame) state.axis = defaultAxis(norm, state.shape, state.channels);
  }

  function chooseRank(rank) {
    state.shape = N.preset(rank, state.channels).join(',');
    state.axis = defaultAxis(state.norm, state.shape, state.channels);
  }

  // The same input with its channels at the other end, and the same axes of it.
  function chooseChannels(channels) {
    const move = channels === 'first' ? N.toFirst : N.toLast;
    const {norm, sets} = evaluate().configuration ?? {};
    state.channels = channels;
    if (!sets) return;
    const order = move(G.range(0, sets.shape.length));
    state.shape = move(sets.shape).map(G.repr).join(',');
    const axes = sets.setAxes.map((axis) => order.indexOf(axis)).sort((a, b) => a - b);
    state.axis = N.NORMS[norm].names === 'set'
      ? axisText(axes.length === 1 ? axes[0] : axes)
      : defaultAxis(norm, state.shape, channels);
    if (position) position = move(position);
  }

  // Of a norm that names its channels, these say whether they lie first or last.
  function followChannels({norm, sets}) {
    const [channel] = sets.parameterAxes;
    if (sets.shape.length > 2 && N.NORMS[norm].names !== 'set') {
      state.channels = channel === 1 ? 'first' : 'last';
    }
  }

  function evaluate() {
    try {
      return {configuration: N.configure(state)};
    } catch (error) {
      if (error instanceof G.PythonError) return {error};
      throw error;
    }
  }

  function fill(id, text) {
    // What is being typed stays as it is typed.
    if (document.activeElement !== $(id) || dense($(id).value) !== dense(text)) $(id).value = text;
  }

  function showControls() {
    const {names, hasGroups, note} = N.NORMS[state.norm];
    $('norm').value = state.norm;
    fill('shape', spaced(state.shape));
    fill('axis', spaced(state.axis));
    fill('groups', state.groups);
    $('axis-label').textContent = N.AXIS_LABELS[names] ?? '';
    $('axis-field').hidden = names === 'nothing';
    $('groups-field').hidden = !hasGroups;
    $('note').textContent = note ?? '';
    $('note').hidden = !note;
    for (const radio of document.getElementsByName('channels')) {
      radio.checked = radio.value === state.channels;
    }
    const rank = rankOf(state.shape);
    for (const button of $('ranks').children) {
      button.setAttribute('aria-pressed', String(Number(button.dataset.rank) === rank));
    }
  }

  // What is shown.

  function show() {
    clearTimeout(errorTimer);
    const {configuration, error} = evaluate();
    if (configuration) followChannels(configuration);
    showControls();
    $('findings').hidden = !configuration;
    if (configuration) showFindings(configuration);
    const wrong = error ?? whyNotDrawn(configuration.sets.shape);
    showError(wrong);
    $('picture').hidden = Boolean(wrong);
    shown = wrong ? null : {configuration, ...drawingOf(configuration)};
    if (shown) showPicture();
    else $('axes').textContent = '';
  }

  // As the figure's errors, but for the number of elements.
  function whyNotDrawn(shape) {
    const named = `shape ${G.tuple(shape)}`;
    if (shape.length > 5) {
      return new G.PythonError(null, `${named} has rank ${shape.length}, but the figure draws ` +
        'rank 2 to 5; give a shape such as (4, 5, 5, 8)');
    }
    if (shape.some((extent) => extent === null || extent < 1)) {
      return new G.PythonError(null, `${named} has an extent that is unknown or empty; every ` +
        'extent must be a positive int to be drawn');
    }
    const elements = G.product(shape);
    return elements <= MOST_ELEMENTS ? null : new G.PythonError(null,
      `${named} has ${elements} elements, and more than ${MOST_ELEMENTS} cannot be told apart; ` +
        'draw a smaller shape, such as (4, 5, 5, 8): the pattern is the same');
  }

  function showError(error) {
    const field = error?.message.match(/^(groups|axis|shape)\b/)?.[1] ?? (error ? 'shape' : null);
    for (const id of ['groups', 'axis', 'shape']) {
      $(id).setAttribute('aria-invalid', String(id === field));
    }
    $('error').hidden = !error;
    const text = error ? [error.type, error.message].filter(Boolean).join(': ') : '';
    // An alert that does not change is not to be read out again.
    if ($('error').textContent !== text) $('error').textContent = text;
  }

  function drawingOf({norm, sets}) {
    const {shape, parameterAxes} = sets;
    const laid = state.channels === 'first' ? 1 : shape.length - 1;
    const channel = N.NORMS[norm].names === 'set' ? laid : parameterAxes[0] || laid;
    const spatial = G.range(1, shape.length).filter((axis) => axis !== channel);
    const names = shape.map((_, axis) => {
      if (axis === 0) return 'N';
      return axis === channel ? 'C' : SPATIAL_NAMES[spatial.length][spatial.indexOf(axis)];
    });
    return {names, axes: {channel, spatial}, blockView: block.layout(sets, {channel, spatial})};
  }

  function showPicture() {
    const {configuration: {sets}, names} = shown;
    const fits = position?.length === sets.shape.length &&
      position.every((index, axis) => index >= 0 && index < sets.shape[axis]);
    if (!fits) position = sets.shape.map(() => 0);
    $('axes').textContent =
      `Axes: ${names.map((name, axis) => `${axis} ${name} = ${sets.shape[axis]}`).join(', ')}`;
    showPositionFields();
    layOutMaps();
    showElement();
  }

  function layOutMaps() {
    const {configuration: {sets}, axes, names} = shown;
    const width = $('maps').parentElement.clientWidth - 8;  // but for its padding
    const view = maps.layout(sets, axes, width);
    shown.mapsView = view;
    size($('maps'), view);
    $('maps').innerHTML = `${maps.labels(view, names)}<g>${maps.cells(view)}</g>` +
      '<path class="shares-outline"/><circle class="shares-dot"/>';
    shown.cells = [...$('maps').querySelectorAll('.shares-cell')];
    shown.kinds = [];
    size($('block'), shown.blockView);
  }

  function size(svg, {width, height}) {
    svg.setAttribute('viewBox', `0 0 ${width.toFixed(1)} ${height.toFixed(1)}`);
    svg.setAttribute('width', width.toFixed(1));
    svg.setAttribute('height', height.toFixed(1));
  }

  function showElement() {
    const {configuration: {sets}, names, mapsView: view, blockView} = shown;
    const number = G.setNumber(sets, position);
    const {row, column} = maps.place(view, position);
    const numbers = view.numbers.flat();
    const chosen = row * view.columns + column;
    shown.cells.forEach((cell, i) => {
      const isShared = numbers[i] === number ? ' shares-is-shared' : '';
      const kind = `shares-cell${isShared}${i === chosen ? ' shares-is-chosen' : ''}`;
      // To ask first is far cheaper than to write what is there.
      if (shown.kinds[i] !== kind) cell.setAttribute('class', kind);
      shown.kinds[i] = kind;
    });
    $('maps').querySelector('.shares-outline').setAttribute('d', maps.outline(view, number));
    const dot = $('maps').querySelector('.shares-dot');
    dot.setAttribute('cx', view.x(column) + view.cell / 2);
    dot.setAttribute('cy', view.y(row) + view.cell / 2);
    dot.setAttribute('r', Math.min(4, view.cell / 5));
    $('block').innerHTML = block.drawn(blockView, position, names);
    const text = describe(sets, number);
    $('status').textContent = text;
    $('block').setAttribute('aria-label', `The input as a block. ${text}`);
    for (const input of $('position').querySelectorAll('input')) {
      const value = String(position[Number(input.dataset.axis)]);
      if (input.value !== value) input.value = value;
    }
  }

  function describe(sets, number) {
    return `Element ${G.tuple(position)} is in set ${number + 1} of ${sets.setCount}, ` +
      `with ${elements(sets.setSize)}.`;
  }

  // The fields stay the same while the axes do: one of them may have the focus.
  function showPositionFields() {
    const {configuration: {sets}, names} = shown;
    const key = names.map((name, axis) => `${name}${sets.shape[axis]}`).join();
    if ($('position').dataset.key === key) return;
    $('position').dataset.key = key;
    $('position').innerHTML = names.map((name, axis) =>
      `<label>${name} <input type="number" min="0" max="${sets.shape[axis] - 1}" ` +
        `data-axis="${axis}"></label>`).join('');
  }

  function showFindings(configuration) {
    const {norm, sets} = configuration;
    const columns = Object.entries(sets.extents).map(([name, extent]) =>
      ({name, extent, kind: sets.per.includes(name) ? 'shares-per' : ''}));
    $('extent-names').innerHTML = columns.map(({name, kind}) =>
      `<th scope="col" class="${kind}">${name}</th>`).join('');
    $('extents').innerHTML = columns.map(({extent, kind}) =>
      `<td class="${kind}">${G.repr(extent)}</td>`).join('');
    const facts = {
      Sets: `${G.repr(sets.setCount)}, each of ${elements(sets.setSize)}`,
      Statistics: statistics(sets, N.NORMS[norm].onCpu(sets).kernel === 'native'),
      'gamma and beta': unbroken(sets.parameterShape),
      'Pattern in memory': PATTERNS[sets.pattern] ?? 'none: the sets are not neighbouring axes',
      CPU: kernel(N.NORMS[norm].onCpu(sets)),
      GPU: kernel(N.NORMS[norm].onGpu(sets)),
    };
    $('facts').innerHTML =
      Object.entries(facts).map(([name, fact]) => `<div><dt>${name}</dt><dd>${fact}</dd></div>`).join('');
    const op = N.opLine(configuration);
    $('layer').textContent = N.layerLine(configuration);
    $('op').textContent = op ?? '';
    $('op-row').hidden = !op;
    $('copied').textContent = '';
  }

  function statistics({statisticsShape, broadcastStatisticsShape}, hasKernels) {
    const broadcast = `${unbroken(broadcastStatisticsShape)} to broadcast`;
    return hasKernels ? `${unbroken(statisticsShape)} in the kernels, ${broadcast}` : broadcast;
  }

  const elements = (count) => `${G.repr(count)} ${count === 1 ? 'element' : 'elements'}`;

  // A shape that no line breaks.
  const unbroken = (shape) => `<span class="shares-tuple">${G.tuple(shape)}</span>`;

  function kernel({kernel: name, reason, files}) {
    if (reason) return `${name}: ${reason}`;
    const [forward, backward] = files;
    if (!forward) return name;
    if (!backward || backward === forward) return `${name}, ${forward}`;
    return `${name}, ${forward}; backward ${backward}`;
  }

  // What is done.

  function moveTo(next) {
    if (!next || String(next) === String(position)) return;
    position = next;
    showElement();
    writeElementSoon();
  }

  function stepSet(step) {
    const {sets} = shown.configuration;
    const number = (G.setNumber(sets, position) + step + sets.setCount) % sets.setCount;
    moveTo(G.firstOfSet(sets, number));
  }

  function pointAt(event) {
    const {row, column, block: cell} = event.target.dataset ?? {};
    if (row !== undefined) moveTo(maps.positionAt(shown.mapsView, Number(row), Number(column)));
    if (cell) moveTo(block.positionAt(shown.blockView, cell.split(',').map(Number)));
  }

  function pressKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const {shape} = shown.configuration.sets;
    if (event.key in KEYS) {
      moveTo(maps.moved(shown.mapsView, position, {...KEYS[event.key], far: event.shiftKey}));
    } else if (event.key === 'PageUp' || event.key === 'PageDown') {
      stepSet(event.key === 'PageUp' ? -1 : 1);
    } else if (event.key === 'Home') {
      moveTo(shape.map(() => 0));
    } else if (event.key === 'End') {
      moveTo(shape.map((extent) => extent - 1));
    } else {
      return;
    }
    event.preventDefault();
  }

  function typePosition(event) {
    const axis = Number(event.target.dataset.axis);
    const index = event.target.valueAsNumber;
    if (!Number.isInteger(index) || index < 0 || index >= shown.configuration.sets.shape[axis]) return;
    moveTo(position.map((old, each) => (each === axis ? index : old)));
  }

  let errorTimer;

  // While one types, what is right is shown at once, and an error after a pause only.
  function type(name, value) {
    state[name] = value;
    clearTimeout(errorTimer);
    if (evaluate().configuration) show();
    else errorTimer = setTimeout(show, 700);
  }

  function copyByHand(text) {
    const area = document.createElement('textarea');
    area.value = text;
    area.className = 'shares-offscreen';
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand('copy');
    area.remove();
    return isCopied;
  }

  // Without a server there may be no clipboard, or one that refuses.
  async function copy(id, button) {
    const text = $(id).textContent;
    let isCopied = false;
    try {
      await navigator.clipboard.writeText(text);
      isCopied = true;
    } catch {
      isCopied = copyByHand(text);
      button.focus();
    }
    $('copied').textContent = isCopied ? `Copied: ${text}` : 'The browser does not copy; select the line.';
  }

  function listen() {
    $('norm').addEventListener('change', (event) => { chooseNorm(event.target.value); commit(); });
    for (const name of ['shape', 'axis', 'groups']) {
      $(name).addEventListener('input', (event) => type(name, event.target.value));
      $(name).addEventListener('change', commit);
    }
    $('ranks').addEventListener('click', ({target}) => {
      if (!target.dataset.rank) return;
      chooseRank(Number(target.dataset.rank));
      commit();
    });
    for (const radio of document.getElementsByName('channels')) {
      radio.addEventListener('change', () => { chooseChannels(radio.value); commit(); });
    }
    $('form').addEventListener('submit', (event) => event.preventDefault());
    for (const svg of [$('maps'), $('block')]) {
      svg.addEventListener('pointermove', pointAt);
      svg.addEventListener('pointerdown', pointAt);
    }
    $('maps').addEventListener('keydown', pressKey);
    $('position').addEventListener('input', typePosition);
    $('position').addEventListener('change', () => shown && showElement());
    $('previous').addEventListener('click', () => stepSet(-1));
    $('next').addEventListener('click', () => stepSet(1));
    for (const id of ['layer', 'op']) {
      $(`copy-${id}`).addEventListener('click', (event) => copy(id, event.currentTarget));
    }
    window.addEventListener('popstate', () => { readAddress(); show(); });
    new ResizeObserver(() => {
      if (!shown) return;
      layOutMaps();
      showElement();
    }).observe($('maps').parentElement);
  }

  function begin() {
    $('norm').innerHTML = Object.entries(N.NORMS)
      .map(([name, {label}]) => `<option value="${name}">${label}</option>`).join('');
    $('ranks').innerHTML = [2, 3, 4, 5].map((rank) =>
      `<button type="button" data-rank="${rank}" aria-label="rank ${rank}">${rank}</button>`).join('');
    document.getElementById('shares').hidden = false;
    listen();
    readAddress();
    show();
  }

  begin();
})();
