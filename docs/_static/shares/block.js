// The input as a block of N x C x (spatial), as `normwise figure` draws it, but of frosted glass: a set
// that touches none of the three faces shimmers through.
'use strict';

globalThis.normwiseBlock = (() => {
  const G = globalThis.normwiseGeometry;

  // Where a step along N, C and the positions leads on paper, as in tutorial/figures.py.
  const STEPS = [[0.87, -0.46], [-0.87, -0.46], [0, 1]];
  const SIZE = {width: 300, height: 330};
  const MARGIN = {side: 26, top: 6, bottom: 22};
  const FACES = ['right', 'left', 'top'];  // seen where the sample, the channel, the position is less
  const HIDDEN_AXIS = {left: 0, right: 1, top: 2};

  function layout(sets, {channel, spatial}) {
    const {shape} = sets;
    const extents = [shape[0], shape[channel], G.product(spatial.map((axis) => shape[axis]))];
    // An edge grows with the root of its extent, so that no block is a needle.
    const lengths = extents.map((extent) => Math.sqrt(extent) / extent);
    const raw = (point) => [0, 1].map((side) =>
      point.reduce((sum, index, axis) => sum + index * lengths[axis] * STEPS[axis][side], 0));
    const corners = [0, extents[0]].flatMap((n) => [0, extents[1]].flatMap((c) =>
      [0, extents[2]].map((p) => raw([n, c, p]))));
    const [xs, ys] = [0, 1].map((side) => corners.map((corner) => corner[side]));
    const [left, top] = [Math.min(...xs), Math.min(...ys)];
    const scale = Math.min(
      (SIZE.width - 2 * MARGIN.side) / (Math.max(...xs) - left),
      (SIZE.height - MARGIN.top - MARGIN.bottom) / (Math.max(...ys) - top));
    const shift = (SIZE.width - scale * (Math.max(...xs) - left)) / 2;
    const view = {
      shape, channel, spatial, extents,
      width: SIZE.width,
      height: MARGIN.top + MARGIN.bottom + scale * (Math.max(...ys) - top),
      paper: (point) => {
        const [x, y] = raw(point);
        return [shift + (x - left) * scale, MARGIN.top + (y - top) * scale];
      },
    };
    // The number of each cell's set, counted once: it is asked for at every move.
    view.numbers = G.range(0, extents[0]).map((n) => G.range(0, extents[1]).map((c) =>
      G.range(0, extents[2]).map((p) => G.setNumber(sets, positionAt(view, [n, c, p])))));
    return view;
  }

  // Where a cell of the block lies in the input, and back.
  function positionAt({shape, channel, spatial}, [sample, index, pixel]) {
    const position = shape.map(() => 0);
    position[0] = sample;
    position[channel] = index;
    for (const axis of [...spatial].reverse()) {
      position[axis] = pixel % shape[axis];
      pixel = Math.floor(pixel / shape[axis]);
    }
    return position;
  }

  function cellOf({shape, channel, spatial}, position) {
    const pixel = spatial.reduce((sum, axis) => sum * shape[axis] + position[axis], 0);
    return [position[0], position[channel], pixel];
  }

  // One side of a cell, as the corners of a polygon.
  function side(view, cell, face) {
    const along = [0, 1, 2].filter((axis) => axis !== HIDDEN_AXIS[face]);
    return [[0, 0], [1, 0], [1, 1], [0, 1]].map((offsets) => {
      const corner = [...cell];
      along.forEach((axis, i) => { corner[axis] += offsets[i]; });
      return view.paper(corner).map((number) => number.toFixed(1)).join(',');
    }).join(' ');
  }

  function polygon(view, cell, face, kind) {
    const drawn = kind ? `shares-${kind} shares-${face}` : 'shares-glass';
    return `<polygon class="${drawn}" points="${side(view, cell, face)}" data-block="${cell}"/>`;
  }

  function everyCell([samples, channels, pixels], visit) {
    for (let n = samples - 1; n >= 0; n -= 1) {
      for (let c = channels - 1; c >= 0; c -= 1) {
        for (let p = pixels - 1; p >= 0; p -= 1) visit([n, c, p]);
      }
    }
  }

  const before = (cell, axis) => cell.map((index, i) => (i === axis ? index - 1 : index));

  // The set's cells, those that are farther from the reader first, each with the sides that no other
  // cell of the set covers; then the glass of the three faces.
  function cells(view, position) {
    const numberOf = ([n, c, p]) => view.numbers[n]?.[c]?.[p];
    const chosen = String(cellOf(view, position));
    const number = numberOf(cellOf(view, position));
    const isIn = (cell) => numberOf(cell) === number;
    const body = [];
    const glass = [];
    everyCell(view.extents, (cell) => {
      const inSet = isIn(cell);
      const kind = String(cell) === chosen ? 'chosen' : 'shared';
      for (const face of FACES) {
        const next = before(cell, HIDDEN_AXIS[face]);
        if (inSet && !isIn(next)) body.push(polygon(view, cell, face, kind));
        if (!inSet && next.includes(-1)) glass.push(polygon(view, cell, face, null));
      }
    });
    return body.join('') + glass.join('');
  }

  // The edges of the block, which stand out, and the dot of the element.
  function edges(view) {
    const [n, c, p] = view.extents;
    const lines = [
      [[0, 0, 0], [n, 0, 0]], [[0, 0, 0], [0, c, 0]], [[0, 0, 0], [0, 0, p]],
      [[n, 0, 0], [n, c, 0]], [[0, c, 0], [n, c, 0]], [[n, 0, 0], [n, 0, p]],
      [[0, c, 0], [0, c, p]], [[0, 0, p], [n, 0, p]], [[0, 0, p], [0, c, p]],
    ];
    const path = lines.map((ends) => `M${ends.map((end) => view.paper(end).join(' ')).join('L')}`);
    return `<path class="shares-edges" d="${path.join('')}"/>`;
  }

  function dot(view, position) {
    const cell = cellOf(view, position);
    const face = ['top', 'left', 'right'].find((each) => cell[HIDDEN_AXIS[each]] === 0);
    const centre = cell.map((index, axis) =>
      (face && HIDDEN_AXIS[face] === axis ? index : index + 0.5));
    const [x, y] = view.paper(centre);
    return `<circle class="shares-dot" cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="3"/>`;
  }

  function labels(view, names) {
    const [n, c, p] = view.extents;
    const spatial = view.spatial.map((axis) => names[axis]).join(', ');
    const text = (point, [dx, dy], anchor, content, turned = '') => {
      const [x, y] = view.paper(point);
      const at = `${(x + dx).toFixed(1)} ${(y + dy).toFixed(1)}`;
      const [px, py] = at.split(' ');
      const turn = turned ? ` transform="rotate(-90 ${at})"` : '';
      return `<text class="shares-name" x="${px}" y="${py}" text-anchor="${anchor}"${turn}>` +
        `${content}</text>`;
    };
    return [
      text([n / 2, 0, p], [5, 14], 'start', names[0]),
      text([0, c / 2, p], [-5, 14], 'end', names[view.channel]),
      spatial && text([0, c, p / 2], [-8, 0], 'middle', `(${spatial})`, 'turned'),
    ].filter(Boolean).join('');
  }

  function drawn(view, position, names) {
    return cells(view, position) + edges(view) + dot(view, position) +
      labels(view, names);
  }

  return {layout, positionAt, drawn};
})();
