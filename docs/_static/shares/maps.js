// The input laid out flat, so that the pointer reaches every element: of rank 4 a row of maps for each
// sample, in it a map for each channel, and in a map a cell for each position. A block alone would show
// the elements of three faces and hide the others.
'use strict';

globalThis.normwiseMaps = (() => {
  const G = globalThis.normwiseGeometry;

  const CELL = {least: 5, most: 30};
  // Pixels more where an axis steps, of several axes the outermost first.
  const GAPS = {1: [], 2: [6], 3: [4, 3]};
  const MARGIN = {top: 36, left: 34, right: 4, bottom: 6};
  const TALLEST = 480;

  // The axes downwards and to the right, the outermost first. A series is drawn as one: time to the
  // right, a line for each channel, a panel for each sample.
  function directions({channel, spatial}) {
    switch (spatial.length) {
      case 0: return {down: [0], right: [channel]};
      case 1: return {down: [channel], right: [0, spatial[0]]};
      case 2: return {down: [0, spatial[0]], right: [channel, spatial[1]]};
      default: return {down: [0, spatial[0], spatial[1]], right: [channel, spatial[2]]};
    }
  }

  const count = (shape, axes) => G.product(axes.map((axis) => shape[axis]));

  // The gaps before a line of cells, in pixels.
  function gapsBefore(shape, axes, line) {
    return GAPS[axes.length].reduce(
      (sum, gap, level) => sum + gap * Math.floor(line / count(shape, axes.slice(level + 1))), 0);
  }

  // Which line of cells a position lies on, and back.
  function lineOf(shape, axes, position) {
    return axes.reduce((line, axis) => line * shape[axis] + position[axis], 0);
  }

  function putOnLine(shape, axes, line, position) {
    const put = [...position];
    for (const axis of [...axes].reverse()) {
      put[axis] = line % shape[axis];
      line = Math.floor(line / shape[axis]);
    }
    return put;
  }

  // A layout no wider than `width`, unless its cells became too small to point at.
  function layout(sets, axes, width) {
    const {shape} = sets;
    const {down, right} = directions(axes);
    const rows = count(shape, down);
    const columns = count(shape, right);
    const gapsRight = gapsBefore(shape, right, columns - 1);
    const gapsDown = gapsBefore(shape, down, rows - 1);
    const cell = Math.max(CELL.least, Math.min(
      CELL.most,
      (width - MARGIN.left - MARGIN.right - gapsRight) / columns,
      (TALLEST - gapsDown) / rows));
    const view = {
      shape, down, right, rows, columns, cell,
      x: (column) => MARGIN.left + column * cell + gapsBefore(shape, right, column),
      y: (row) => MARGIN.top + row * cell + gapsBefore(shape, down, row),
      width: MARGIN.left + columns * cell + gapsRight + MARGIN.right,
      height: MARGIN.top + rows * cell + gapsDown + MARGIN.bottom,
    };
    // The number of each cell's set, counted once: it is asked for at every move.
    view.numbers = G.range(0, rows).map((row) => G.range(0, columns).map((column) =>
      G.setNumber(sets, positionAt(view, row, column))));
    return view;
  }

  function positionAt({shape, down, right}, row, column) {
    const position = shape.map(() => 0);
    return putOnLine(shape, right, column, putOnLine(shape, down, row, position));
  }

  function place({shape, down, right}, position) {
    return {row: lineOf(shape, down, position), column: lineOf(shape, right, position)};
  }

  // The position that a key leads to: a cell further, or with `far` a map further; null past the end.
  function moved(view, position, {direction, step, far}) {
    const axes = view[direction];
    if (far) {
      const put = [...position];
      put[axes[0]] += step;
      return put[axes[0]] >= 0 && put[axes[0]] < view.shape[axes[0]] ? put : null;
    }
    const line = lineOf(view.shape, axes, position) + step;
    const end = count(view.shape, axes);
    return line >= 0 && line < end ? putOnLine(view.shape, axes, line, position) : null;
  }

  function eachCell({rows, columns}, visit) {
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) visit(row, column);
    }
  }

  // All cells as SVG, row by row, with their row and column.
  function cells(view) {
    const size = view.cell.toFixed(2);
    const drawn = [];
    eachCell(view, (row, column) => {
      const at = `x="${view.x(column).toFixed(2)}" y="${view.y(row).toFixed(2)}"`;
      drawn.push(
        `<rect class="shares-cell" ${at} width="${size}" height="${size}" ` +
          `data-row="${row}" data-column="${column}"/>`);
    });
    return drawn.join('');
  }

  // The names of the outermost axes, and the numbers of the samples and channels as far as they fit.
  function labels(view, names) {
    const {shape, down, right} = view;
    const across = numbers(shape, right, view.cell, 20);
    const along = numbers(shape, down, view.cell, 14);
    const text = (x, y, anchor, content, kind = 'number') =>
      `<text class="shares-${kind}" x="${x.toFixed(1)}" y="${y.toFixed(1)}" ` +
        `text-anchor="${anchor}">${content}</text>`;
    return [
      text(MARGIN.left, 12, 'start', `${names[right[0]]} \u2192`, 'name'),
      text(4, MARGIN.top - 7, 'start', `${names[down[0]]} \u2193`, 'name'),
      ...across.map(({index, first, last}) =>
        text((view.x(first) + view.x(last) + view.cell) / 2, MARGIN.top - 7, 'middle', index)),
      ...along.map(({index, first, last}) =>
        text(MARGIN.left - 8, (view.y(first) + view.y(last) + view.cell) / 2 + 4, 'end', index)),
    ].join('');
  }

  // The indices of the outermost axis that are written, each `room` pixels from the next.
  function numbers(shape, axes, cell, room) {
    const each = count(shape, axes.slice(1));
    const every = Math.ceil(room / (each * cell));
    return G.range(0, shape[axes[0]])
      .filter((index) => index % every === 0)
      .map((index) => ({index, first: index * each, last: (index + 1) * each - 1}));
  }

  // The lines around a set: the sides of its cells across which the set ends.
  function outline(view, number) {
    const isIn = (row, column) => view.numbers[row]?.[column] === number;
    const isNext = (place, from) => place(from + 1) - place(from) < view.cell + 0.5;
    const lines = [];
    eachCell(view, (row, column) => {
      if (!isIn(row, column)) return;
      const [x, y] = [view.x(column), view.y(row)];
      const [right, bottom] = [x + view.cell, y + view.cell];
      if (!isIn(row - 1, column) || !isNext(view.y, row - 1)) lines.push(`M${x} ${y}H${right}`);
      if (!isIn(row + 1, column) || !isNext(view.y, row)) lines.push(`M${x} ${bottom}H${right}`);
      if (!isIn(row, column - 1) || !isNext(view.x, column - 1)) lines.push(`M${x} ${y}V${bottom}`);
      if (!isIn(row, column + 1) || !isNext(view.x, column)) lines.push(`M${right} ${y}V${bottom}`);
    });
    return lines.join('');
  }

  return {layout, positionAt, place, moved, cells, labels, outline};
})();
