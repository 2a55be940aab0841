// A map of points on one canvas: pixel writes for points, thumbnails where few are in view.

const LABELS = 40; // groups at most whose names are written on the map
const IN_VIEW = 500; // points at most that are drawn as pictures

/** Finds points by place: a uniform grid of about four points a cell. */
export class Grid {
  constructor(xy, count) {
    this.xy = xy;
    let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < count; i++) {
      left = Math.min(left, xy[2 * i]), right = Math.max(right, xy[2 * i]);
      top = Math.min(top, xy[2 * i + 1]), bottom = Math.max(bottom, xy[2 * i + 1]);
    }
    if (!count) [left, top, right, bottom] = [0, 0, 1, 1];
    const span = Math.max(right - left, bottom - top) || 1;
    Object.assign(this, { left, top, right, bottom, span });
    this.side = Math.max(1, Math.ceil(Math.sqrt(count / 4)));
    this.start = new Uint32Array(this.side * this.side + 1);
    for (let i = 0; i < count; i++) this.start[this.#cellOf(i) + 1]++;
    for (let c = 0; c < this.start.length - 1; c++) this.start[c + 1] += this.start[c];
    this.points = new Uint32Array(count);
    const free = this.start.slice();
    for (let i = 0; i < count; i++) this.points[free[this.#cellOf(i)]++] = i;
  }

  #cell(value, from) {
    const cell = Math.floor(((value - from) / this.span) * this.side);
    return Math.min(this.side - 1, Math.max(0, cell));
  }

  #cellOf(i) {
    return this.#cell(this.xy[2 * i + 1], this.top) * this.side + this.#cell(this.xy[2 * i], this.left);
  }

  /** Points within a rectangle; stops after `most`. */
  inside(x0, y0, x1, y1, most = Infinity) {
    const found = [], { xy } = this;
    const [c0, c1] = [this.#cell(x0, this.left), this.#cell(x1, this.left)];
    const [r0, r1] = [this.#cell(y0, this.top), this.#cell(y1, this.top)];
    for (let r = r0; r <= r1; r++) {
      const end = this.start[r * this.side + c1 + 1];
      for (let p = this.start[r * this.side + c0]; p < end; p++) {
        const i = this.points[p], x = xy[2 * i], y = xy[2 * i + 1];
        if (x < x0 || x > x1 || y < y0 || y > y1) continue;
        found.push(i);
        if (found.length > most) return found;
      }
    }
    return found;
  }

  /** The point nearest to a place within a radius, or -1. */
  nearest(x, y, radius) {
    let best = -1, least = radius * radius;
    for (const i of this.inside(x - radius, y - radius, x + radius, y + radius)) {
      const away = (this.xy[2 * i] - x) ** 2 + (this.xy[2 * i + 1] - y) ** 2;
      if (away < least || (away === least && best < 0)) [best, least] = [i, away];
    }
    return best;
  }
}

/**
 * Draws points, and reports what the pointer or the keys do.
 *
 * options: xy [2 n], count, pictures (draw(context, id, x, y, box, redraw)), onHover(id, x, y),
 * onPick(id), onSelect(ids). Call paint() to set colors, choose() to set the selection.
 */
export class PointMap {
  constructor(canvas, options) {
    Object.assign(this, options, { canvas, labels: [], colors: [[0, 114, 178]], current: -1 });
    this.grid = new Grid(this.xy, this.count);
    this.context = canvas.getContext("2d", { alpha: false });
    this.codes = new Uint16Array(this.count);
    this.selected = new Uint8Array(this.count);
    this.lasso = null;
    this.lassoMode = false;
    this.pointers = new Map();
    this.#listen();
    new ResizeObserver(() => this.#resize()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  /** Color point i with colors[codes[i]]; names[code] is written at the middle of its points. */
  paint(codes, colors, names = []) {
    Object.assign(this, { codes, colors, labels: [] });
    if (names.length > 1 && names.length <= LABELS) this.labels = this.#middles(names);
    this.redraw();
  }

  /** Set the selection. */
  choose(ids) {
    this.selected.fill(0);
    for (const i of ids) this.selected[i] = 1;
    this.anySelected = ids.length > 0;
    this.redraw();
  }

  /** Make a point current, and move it into view. */
  show(id, zoom = false) {
    this.current = id;
    const [x, y] = this.toScreen(id);
    const out = x < 20 || y < 20 || x > this.width - 20 || y > this.height - 20;
    if (zoom && this.scale < 6 * this.fitted) this.scale = 6 * this.fitted;
    if (zoom || out) this.#center(this.xy[2 * id], this.xy[2 * id + 1]);
    this.redraw();
  }

  toScreen(i) {
    return [this.xy[2 * i] * this.scale + this.dx, this.xy[2 * i + 1] * this.scale + this.dy];
  }

  fit() {
    const { grid, width, height } = this;
    this.fitted = this.scale = Math.min(width - 48, height - 48) / grid.span;
    this.#center((grid.left + grid.right) / 2, (grid.top + grid.bottom) / 2);
    this.redraw();
  }

  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const scale = Math.min(this.fitted * 2000, Math.max(this.fitted * 0.7, this.scale * factor));
    this.dx = x - ((x - this.dx) * scale) / this.scale;
    this.dy = y - ((y - this.dy) * scale) / this.scale;
    this.scale = scale;
    this.redraw();
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.width) this.#draw();
    });
  }

  #center(x, y) {
    this.dx = this.width / 2 - x * this.scale;
    this.dy = this.height / 2 - y * this.scale;
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    this.ratio = Math.min(2, devicePixelRatio || 1);
    Object.assign(this.canvas, { width: Math.round(width * this.ratio), height: Math.round(height * this.ratio) });
    const middle = this.width && [(this.width / 2 - this.dx) / this.scale, (this.height / 2 - this.dy) / this.scale];
    Object.assign(this, { width, height });
    this.image = this.context.createImageData(this.canvas.width, this.canvas.height);
    this.pixels = new Uint32Array(this.image.data.buffer);
    if (!middle) return this.fit();
    this.#center(...middle);
    this.redraw();
  }

  #middles(names) {
    const places = names.map(() => [[], []]);
    const step = Math.ceil(this.count / 20000);
    for (let i = 0; i < this.count; i += step) {
      const place = places[this.codes[i]];
      if (place) place[0].push(this.xy[2 * i]), place[1].push(this.xy[2 * i + 1]);
    }
    const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
    return names.flatMap((name, code) => {
      const [xs, ys] = places[code];
      const text = name.length > 22 ? `${name.slice(0, 21)}…` : name;
      return xs.length ? [{ text, x: median(xs), y: median(ys) }] : [];
    });
  }

  #draw() {
    const style = getComputedStyle(this.canvas);
    const [back, text] = ["--back", "--text"].map((name) => style.getPropertyValue(name));
    const { context, ratio } = this;
    const [left, top] = [-this.dx / this.scale, -this.dy / this.scale];
    const [right, bottom] = [(this.width - this.dx) / this.scale, (this.height - this.dy) / this.scale];
    const near = this.grid.inside(left, top, right, bottom, IN_VIEW);
    const few = near.length <= IN_VIEW && (this.scale > 1.5 * this.fitted || this.count <= 60);
    this.shown = few ? near : null; // null: points, no pictures
    context.setTransform(1, 0, 0, 1, 0, 0);
    this.#drawPoints(few ? near : null, back);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (few) this.#drawPictures(near);
    else this.#drawLabels(back, text);
    this.#drawMarks(text);
  }

  #drawPoints(some, back) {
    const { pixels, image, codes, selected, anySelected, ratio } = this;
    const [wide, high] = [image.width, image.height];
    const [r, g, b] = rgb(back);
    const pack = (red, green, blue) => (255 << 24) | (blue << 16) | (green << 8) | red;
    const full = Uint32Array.from(this.colors, (c) => pack(...c));
    const mixed = (c, to) => Math.round(0.22 * c + 0.78 * to);
    const pale = Uint32Array.from(this.colors, (c) => pack(mixed(c[0], r), mixed(c[1], g), mixed(c[2], b)));
    pixels.fill(pack(r, g, b));
    const radius = this.count > 200000 ? 0 : (this.count > 20000 ? 1.1 : this.count > 3000 ? 2.3 : 3.2) * ratio;
    const disc = [], reach = Math.floor(radius);
    for (let y = -reach; y <= reach; y++)
      for (let x = -reach; x <= reach; x++) if (x * x + y * y <= radius * radius) disc.push(y * wide + x);
    const { xy } = this, count = some ? some.length : this.count;
    const [scale, dx, dy] = [this.scale * ratio, this.dx * ratio, this.dy * ratio];
    for (const wanted of anySelected ? [0, 1] : [0]) {
      const colors = anySelected && !wanted ? pale : full;
      for (let n = 0; n < count; n++) {
        const i = some ? some[n] : n;
        if (anySelected && selected[i] !== wanted) continue;
        const x = (xy[2 * i] * scale + dx) | 0, y = (xy[2 * i + 1] * scale + dy) | 0;
        if (x < reach || y < reach || x >= wide - reach || y >= high - reach) continue;
        const color = colors[codes[i]] ?? colors[0], at = y * wide + x;
        for (let d = 0; d < disc.length; d++) pixels[at + disc[d]] = color;
      }
    }
    this.context.putImageData(image, 0, 0);
  }

  #drawPictures(ids) {
    const { context } = this, box = this.#box();
    for (const i of ids) {
      const [x, y] = this.toScreen(i);
      context.globalAlpha = this.anySelected && !this.selected[i] ? 0.3 : 1;
      const size = this.pictures.draw(context, i, x, y, box, () => this.redraw());
      if (!size) continue;
      Object.assign(context, { strokeStyle: `rgb(${this.colors[this.codes[i]] ?? this.colors[0]})`, lineWidth: 2 });
      context.strokeRect(x - size[0] / 2, y - size[1] / 2, ...size);
    }
    context.globalAlpha = 1;
  }

  #drawLabels(back, text) {
    const { context } = this, taken = [];
    const font = "600 12px system-ui, sans-serif";
    Object.assign(context, { font, textAlign: "center", textBaseline: "middle", lineJoin: "round", lineWidth: 4 });
    for (const label of this.labels) {
      const [x, y] = [label.x * this.scale + this.dx, label.y * this.scale + this.dy];
      const half = context.measureText(label.text).width / 2;
      if (taken.some(([tx, ty, th]) => Math.abs(tx - x) < th + half + 4 && Math.abs(ty - y) < 15)) continue;
      taken.push([x, y, half]);
      Object.assign(context, { strokeStyle: back, fillStyle: text });
      context.strokeText(label.text, x, y);
      context.fillText(label.text, x, y);
    }
  }

  #drawMarks(text) {
    const { context } = this;
    Object.assign(context, { strokeStyle: text, lineWidth: 2 });
    if (this.current >= 0) {
      context.beginPath();
      context.arc(...this.toScreen(this.current), 9, 0, 7);
      context.stroke();
    }
    if (this.lasso) {
      context.setLineDash([5, 4]);
      context.beginPath();
      for (const [x, y] of this.lasso) context.lineTo(x, y);
      context.closePath();
      context.stroke();
      context.setLineDash([]);
    }
  }

  // --- Pointer and keys ---

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.onHover(-1));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("dblclick", (event) => this.zoom(2, event.offsetX, event.offsetY));
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
  }

  #wheel(event) {
    // Scrolling down at the whole map scrolls the page on.
    if (event.deltaY > 0 && this.scale <= this.fitted && !event.ctrlKey) return;
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 30 : 1, rate = event.ctrlKey ? 0.01 : 0.002;
    this.zoom(Math.exp(-event.deltaY * lines * rate), event.offsetX, event.offsetY);
  }

  /** The point or picture at a place of the canvas, or -1. */
  at(x, y, reach) {
    if (this.shown) {
      for (let n = this.shown.length - 1; n >= 0; n--) {
        const [px, py] = this.toScreen(this.shown[n]);
        const [w, h] = this.pictures.sizeIn(this.shown[n], this.#box()) ?? [0, 0];
        if (Math.abs(px - x) <= w / 2 && Math.abs(py - y) <= h / 2) return this.shown[n];
      }
    }
    return this.grid.nearest((x - this.dx) / this.scale, (y - this.dy) / this.scale, reach / this.scale);
  }

  #box() {
    const room = Math.sqrt((this.width * this.height) / Math.max(8, this.shown.length));
    return Math.min(96, Math.max(22, 0.8 * room));
  }

  #down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    this.moved = this.pointers.size > 1;
    this.lasso = (this.lassoMode || event.shiftKey) && this.pointers.size === 1 ? [[event.offsetX, event.offsetY]] : null;
  }

  #move(event) {
    const [x, y] = [event.offsetX, event.offsetY];
    const before = this.pointers.get(event.pointerId);
    if (!before) return this.onHover(this.at(x, y, 10), x, y);
    if (Math.hypot(x - before[0], y - before[1]) < 3 && !this.moved) return;
    this.moved = true;
    this.onHover(-1);
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    if (this.lasso && !other) this.lasso.push([x, y]);
    else {
      this.dx += (x - before[0]) / this.pointers.size;
      this.dy += (y - before[1]) / this.pointers.size;
      if (other) {
        const spread = Math.hypot(x - other[0], y - other[1]) / Math.hypot(before[0] - other[0], before[1] - other[1]);
        if (spread > 0 && isFinite(spread)) this.zoom(spread, (x + other[0]) / 2, (y + other[1]) / 2);
      }
    }
    this.pointers.set(event.pointerId, [x, y]);
    this.redraw();
  }

  #up(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    const lasso = this.lasso;
    this.lasso = null;
    if (lasso && lasso.length > 2) this.onSelect(this.within(lasso));
    else if (!this.moved) {
      const id = this.at(event.offsetX, event.offsetY, event.pointerType === "touch" ? 24 : 12);
      if (id >= 0) this.onPick(id);
      else if (this.anySelected) this.onSelect([]);
    }
    this.redraw();
  }

  /** Points within a polygon [[x, y], ...] on the canvas, by the even-odd rule. */
  within(polygon) {
    const corners = polygon.map(([x, y]) => [(x - this.dx) / this.scale, (y - this.dy) / this.scale]);
    const [xs, ys] = [corners.map((c) => c[0]), corners.map((c) => c[1])];
    const box = [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
    return this.grid.inside(...box).filter((i) => {
      const [x, y] = [this.xy[2 * i], this.xy[2 * i + 1]];
      let inside = false;
      for (let a = 0, b = corners.length - 1; a < corners.length; b = a++) {
        if (ys[a] > y !== ys[b] > y && x < ((xs[b] - xs[a]) * (y - ys[a])) / (ys[b] - ys[a]) + xs[a]) inside = !inside;
      }
      return inside;
    });
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = steps[event.key];
    if (step && event.shiftKey) (this.dx -= 60 * step[0]), (this.dy -= 60 * step[1]), this.redraw();
    else if (step) this.#go(step);
    else if (event.key === "+" || event.key === "=") this.zoom(1.5, ...this.#focus());
    else if (event.key === "-") this.zoom(1 / 1.5, ...this.#focus());
    else if (event.key === "0") this.fit();
    else if (event.key === "Enter" && this.current >= 0) this.onPick(this.current);
    else if (event.key === " " && this.current >= 0) this.onToggle(this.current);
    else if (event.key === "Escape") this.onSelect([]);
    else return;
    event.preventDefault();
  }

  #focus() {
    return this.current >= 0 ? this.toScreen(this.current) : [this.width / 2, this.height / 2];
  }

  /** Make the nearest point in a direction current. */
  #go([right, down]) {
    const { xy } = this;
    if (!this.count) return;
    let best = -1, least = Infinity;
    const middle = [(this.width / 2 - this.dx) / this.scale, (this.height / 2 - this.dy) / this.scale];
    const [x, y] = this.current < 0 ? middle : [xy[2 * this.current], xy[2 * this.current + 1]];
    for (let i = 0; i < this.count; i++) {
      const along = (xy[2 * i] - x) * right + (xy[2 * i + 1] - y) * down;
      const across = Math.abs((xy[2 * i] - x) * down) + Math.abs((xy[2 * i + 1] - y) * right);
      if (i === this.current || (this.current >= 0 && (along <= 0 || across > along))) continue;
      const away = Math.abs(along) + 2 * across;
      if (away < least) [best, least] = [i, away];
    }
    if (best >= 0) this.show(best), this.onPick(best);
  }
}

/** [red, green, blue] of a CSS color such as #fff or #17171a. */
function rgb(text) {
  const hex = text.trim().slice(1), parts = hex.length === 3 ? [...hex].map((c) => c + c) : hex.match(/../g);
  return parts.map((part) => parseInt(part, 16));
}
