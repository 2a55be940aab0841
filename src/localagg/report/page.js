// The parts of a page: the map with its side panel, and sections of pictures.
//
// start(data, items) draws them. `items` gives what may be large: the report reads it from the page
// itself (EmbeddedItems), a server may give the same methods.
import { PointMap } from "./map.js";

const PALETTE = [
  [0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [213, 94, 0], [86, 180, 233],
  [184, 169, 0], [136, 34, 85], [68, 170, 153], [120, 120, 120],
];
const ROWS = 24; // of a section, before the rest is asked for
const LISTED = 100; // paths of a selection that are listed

/** Create an element; properties are set, children appended. Text is never parsed as HTML. */
function make(tag, properties = {}, ...children) {
  const { dataset, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, dataset);
  element.append(...children);
  return element;
}

/** Items of the page: arrays in base64, thumbnails as tiles of WebP sheets. */
export class EmbeddedItems {
  constructor(data) {
    this.data = data;
    this.count = data.count ?? data.paths.length;
    this.sheets = [];
    this.sizes = this.array("sizes", Uint8Array);
  }

  /** An array of the page, or null. */
  array(name, Type) {
    const text = document.getElementById(`array-${name}`)?.textContent;
    if (text === undefined) return null;
    const binary = atob(text), bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new Type(bytes.buffer);
  }

  /** {path, neighbors: [[id, similarity], ...]} of an item. */
  async details(id) {
    const { width = 0 } = this.data.neighbors ?? {};
    this.near ??= this.array("neighbors", Uint16Array);
    this.similarity ??= this.array("similarity", Int16Array);
    const neighbors = Array.from({ length: width }, (_, n) => id * width + n);
    return { path: this.data.paths[id], neighbors: neighbors.map((at) => [this.near[at], this.similarity[at] / 32767]) };
  }

  async paths(ids) {
    return ids.map((id) => this.data.paths[id]);
  }

  /** Width and height of a thumbnail fitted into a square, or null without a picture. */
  sizeIn(id, box) {
    const [width, height] = this.sizes?.subarray(2 * id, 2 * id + 2) ?? [0, 0];
    const longest = Math.max(width, height);
    return longest ? [(width * box) / longest, (height * box) / longest] : null;
  }

  /** Draw a thumbnail around (x, y); return its size, or null. Calls `again` once it is decoded. */
  draw(context, id, x, y, box, again) {
    const size = this.sizeIn(id, box);
    if (!size) return null;
    const { side } = this.data, columns = Math.floor(1024 / side), tile = id % (columns * columns);
    const sheet = this.#sheet(Math.floor(id / (columns * columns)));
    if (!sheet) document.addEventListener("DOMContentLoaded", again, { once: true });
    else if (!sheet.complete) sheet.addEventListener("load", again, { once: true });
    else {
      const from = [(tile % columns) * side, Math.floor(tile / columns) * side, ...this.sizes.subarray(2 * id, 2 * id + 2)];
      context.drawImage(sheet, ...from, x - size[0] / 2, y - size[1] / 2, ...size);
    }
    return size;
  }

  /** A sheet, or null while the browser has not read it. */
  #sheet(number) {
    const block = document.getElementById(`sheet-${number}`);
    if (document.readyState === "loading" && !block?.nextElementSibling) return null;
    this.sheets[number] ??= make("img", { src: `data:image/webp;base64,${block.textContent}` });
    return this.sheets[number];
  }

  /** A canvas with the thumbnail, drawn at once or when it comes into view. */
  thumbnail(id, box, lazily = false) {
    const size = this.sizeIn(id, box), [width, height] = size ?? [box / 2, box / 2];
    const ratio = Math.min(2, devicePixelRatio || 1);
    const canvas = make("canvas", { width: width * ratio, height: height * ratio });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    if (!size) canvas.className = "missing";
    const context = canvas.getContext("2d");
    const draw = () => {
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      this.draw(context, id, width / 2, height / 2, box, draw);
    };
    if (!lazily) return draw(), canvas;
    const seen = new IntersectionObserver(([entry]) => entry.isIntersecting && (seen.disconnect(), draw()), { rootMargin: "400px" });
    seen.observe(canvas);
    return canvas;
  }
}

/** Draw all parts, and return them. `data`: {paths, side, sections, columns, map, neighbors}; see report.py. */
export function start(data, items) {
  const parts = document.getElementById("parts");
  const page = { data, items, map: null, selectionTools: [], dialog: make("dialog", { ariaLabel: "Picture" }) };
  page.dialog.addEventListener("click", (event) => event.target === page.dialog && page.dialog.close());
  parts.append(page.dialog);
  if (data.map) parts.append(mapPart(page));
  for (const section of data.sections ?? []) parts.append(sectionPart(page, section));
  const nav = document.querySelector("nav"), titles = document.querySelectorAll("main h2, #foot h2");
  titles.forEach((title, n) => {
    title.id ||= `part-${n}`;
    nav.append(make("a", { href: `#${title.id}`, textContent: title.textContent }));
  });
  return page;
}

// --- Sections of pictures ---

function sectionPart(page, { title, note, rows, pairs }) {
  const part = make("section", {}, make("h2", { textContent: title }));
  if (note) part.append(make("p", { className: "note", textContent: note }));
  const list = make("div", { className: pairs ? "pairs" : "" });
  const more = make("button", { type: "button" });
  const add = (count) => {
    const from = list.childElementCount;
    list.append(...rows.slice(from, from + count).map((row) => rowPart(page, row)));
    const left = rows.length - list.childElementCount;
    more.textContent = `Show ${left.toLocaleString("en")} more`;
    more.hidden = left <= 0;
  };
  more.addEventListener("click", () => add(200));
  add(ROWS);
  part.append(list, more);
  return part;
}

function rowPart(page, { title, items, lines, select }) {
  const heading = make("h3", {}, make("bdi", { textContent: title }));
  if (select && page.map) {
    const button = make("button", { type: "button", textContent: "Select on the map" });
    button.addEventListener("click", () => page.selectGroup(...select));
    heading.append(" ", button);
  }
  const pictures = items.map((id, n) => pictureButton(page, id, lines?.[n] ?? [], 96));
  return make("div", {}, title || select ? heading : "", make("div", { className: "pictures" }, ...pictures));
}

function pictureButton(page, id, lines, box, open) {
  const path = page.data.paths?.[id] ?? `image ${id}`;
  const button = make("button", { type: "button", className: "picture", title: path, ariaLabel: [path, ...lines].join(", ") });
  button.append(page.items.thumbnail(id, box, !open), ...lines.map((line) => make("span", {}, make("bdi", { textContent: line }))));
  button.dataset.id = id;
  button.addEventListener("click", open ?? (() => openDialog(page, id, lines)));
  return button;
}

async function openDialog(page, id, lines = []) {
  const close = make("button", { type: "button", textContent: "Close", autofocus: true });
  close.addEventListener("click", () => page.dialog.close());
  const tools = make("div", { className: "tools" }, close);
  if (page.map) {
    const show = make("button", { type: "button", textContent: "Show on the map" });
    show.addEventListener("click", () => {
      page.dialog.close();
      page.pick(id);
      page.map.show(id, true);
      page.map.canvas.scrollIntoView({ block: "center" });
      page.map.canvas.focus({ preventScroll: true });
    });
    tools.append(show);
  }
  const texts = lines.map((line) => make("p", {}, make("bdi", { textContent: line })));
  const body = await describe(page, id, (other) => openDialog(page, other));
  page.dialog.replaceChildren(...body, ...texts, tools);
  if (!page.dialog.open) page.dialog.showModal();
}

/** Elements that describe an item: large picture, path, columns, nearest pictures. */
async function describe(page, id, open) {
  const { path, neighbors } = await page.items.details(id);
  const large = page.items.thumbnail(id, Math.min(280, 2.5 * (page.data.side ?? 96)));
  large.classList.add("large");
  const facts = (page.data.columns ?? []).map((column) => `${column.name}: ${valueOf(page, column, id)}`);
  const elements = [large, make("p", { className: "path" }, make("bdi", { textContent: path }))];
  if (facts.length) elements.push(make("p", { className: "note" }, make("bdi", { textContent: facts.join(" · ") })));
  if (neighbors.length) {
    const near = neighbors.map(([other, s]) => pictureButton(page, other, [s.toFixed(2)], 56, () => open(other)));
    elements.push(make("h3", { textContent: `${near.length} nearest, by cosine` }));
    elements.push(make("div", { className: "pictures" }, ...near));
  }
  return elements;
}

// --- The map ---

function values(page, column) {
  column.values ??= page.items.array(column.array, column.names ? Uint16Array : Float32Array);
  return column.values;
}

function valueOf(page, column, id) {
  const value = values(page, column)[id];
  return column.names ? column.names[value] : Number(value.toPrecision(4));
}

function colorOf(code) {
  if (code < PALETTE.length) return PALETTE[code];
  const hue = (code * 137.508) % 360, light = [0.42, 0.55, 0.66][code % 3];
  const part = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (light - 0.6 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [part(0), part(8), part(4)];
}

// From dark blue through green to yellow, readable on light and dark.
const RAMP = Array.from({ length: 64 }, (_, n) => {
  const t = n / 63, stops = [[68, 60, 160], [35, 145, 140], [240, 200, 40]];
  const [from, to, part] = t < 0.5 ? [stops[0], stops[1], 2 * t] : [stops[1], stops[2], 2 * t - 1];
  return from.map((c, i) => Math.round(c + (to[i] - c) * part));
});

function mapPart(page) {
  const { data, items } = page;
  const canvas = make("canvas", { tabIndex: 0, ariaLabel: "Map of the images. Arrow keys go from image to image, plus and minus zoom, 0 shows all, Enter opens, Space selects." });
  canvas.setAttribute("role", "application");
  const tip = make("div", { className: "tip", hidden: true });
  const side = make("div", { className: "side", ariaLive: "polite" }, make("p", { className: "note", textContent: "Choose a point to see its picture and its nearest pictures." }));
  const chosen = make("div", { className: "tools selection" }), legend = make("div");
  const listed = make("ol", { className: "chosen", hidden: true });
  let selection = [];

  page.pick = async (id) => {
    page.map.current = id;
    page.map.redraw();
    side.replaceChildren(...(await describe(page, id, (other) => (page.pick(other), page.map.show(other)))));
  };
  page.select = async (ids) => {
    selection = page.selection = ids;
    page.map.choose(ids);
    canvas.dataset.selected = ids.length;
    const paths = await items.paths(ids.slice(0, LISTED));
    listed.replaceChildren(...paths.map((path) => make("li", {}, make("bdi", { textContent: path }))));
    if (ids.length > LISTED) listed.append(make("li", { textContent: `and ${(ids.length - LISTED).toLocaleString("en")} more` }));
    listed.hidden = !ids.length;
    chosen.replaceChildren(...(ids.length ? [make("span", { textContent: `${ids.length.toLocaleString("en")} selected` }), save, clear, ...page.selectionTools] : []));
  };
  page.selectGroup = (name, code) => {
    const column = data.columns.find((each) => each.name === name);
    if (color.value !== name) (color.value = name), paint();
    const codes = values(page, column), ids = [];
    for (let i = 0; i < items.count; i++) if (codes[i] === code) ids.push(i);
    page.select(ids);
    canvas.scrollIntoView({ block: "center" });
  };

  const button = (textContent, action, title = "") => {
    const made = make("button", { type: "button", textContent, title, ariaLabel: title || textContent });
    made.addEventListener("click", action);
    return made;
  };
  const save = button("Save list", async () => saveText("paths.csv", csv(page, selection, await items.paths(selection))));
  const clear = button("Clear", () => page.select([]));
  const lasso = button("Lasso", () => {
    page.map.lassoMode = !page.map.lassoMode;
    lasso.ariaPressed = String(page.map.lassoMode);
  }, "Lasso: draw around images to select them (or hold Shift)");
  lasso.ariaPressed = "false";
  const color = make("select", { ariaLabel: "Color by" }, ...data.columns.map(({ name }) => make("option", { textContent: name, value: name })));
  const paint = () => {
    const column = data.columns.find(({ name }) => name === color.value);
    legend.replaceChildren(column ? paintBy(page, column) : "");
  };
  page.paint = paint;
  color.addEventListener("change", paint);

  page.map = new PointMap(canvas, {
    xy: items.array("xy", Uint16Array),
    count: items.count,
    pictures: items,
    onPick: page.pick,
    onSelect: page.select,
    onToggle: (id) => page.select(selection.includes(id) ? selection.filter((each) => each !== id) : [...selection, id]),
    onHover: (id, x, y) => {
      tip.hidden = id < 0;
      if (id < 0) return (tip.dataset.id = "");
      Object.assign(tip.style, { left: `${Math.min(x + 14, canvas.clientWidth - 190)}px`, top: `${Math.min(y + 14, canvas.clientHeight - 150)}px` });
      if (tip.dataset.id === String(id)) return;
      tip.dataset.id = id;
      tip.replaceChildren(items.thumbnail(id, 96), make("bdi", { textContent: data.paths?.[id] ?? "" }));
    },
  });
  paint();
  page.select([]);
  const tools = make("div", { className: "tools" });
  if (data.columns.length) tools.append(make("label", {}, "Color by ", color));
  tools.append(
    lasso,
    button("+", () => page.map.zoom(1.6), "Zoom in"),
    button("−", () => page.map.zoom(1 / 1.6), "Zoom out"),
    button("Whole map", () => page.map.fit()),
    chosen,
  );
  const part = make("section", { className: "map-part" }, make("h2", { textContent: "Map" }));
  if (data.map.note) part.append(make("p", { className: "note", textContent: data.map.note }));
  part.append(tools, make("div", { className: "map" }, make("div", { className: "stage" }, canvas, tip), side), legend, listed);
  return part;
}

/** Color the map by a column; return its legend. */
function paintBy(page, column) {
  const found = values(page, column);
  if (column.names) {
    page.map.paint(found, column.names.map((_, code) => colorOf(code)), column.names);
    const entries = column.names.map((name, code) => {
      const dot = make("canvas", { width: 12, height: 12 }), context = dot.getContext("2d");
      context.fillStyle = `rgb(${colorOf(code)})`;
      context.fillRect(0, 0, 12, 12);
      const entry = make("button", { type: "button", title: "Select these images" }, dot, make("bdi", { textContent: name }));
      entry.addEventListener("click", () => page.selectGroup(column.name, code));
      return entry;
    });
    return make("div", { className: "legend" }, ...entries);
  }
  const { low, high } = column, codes = new Uint16Array(found.length);
  for (let i = 0; i < found.length; i++) codes[i] = Math.max(0, Math.min(63, Math.round((63 * (found[i] - low)) / (high - low || 1)))) || 0;
  page.map.paint(codes, RAMP);
  const bar = make("canvas", { width: 192, height: 12 }), context = bar.getContext("2d");
  RAMP.forEach((color, n) => {
    context.fillStyle = `rgb(${color})`;
    context.fillRect(3 * n, 0, 3, 12);
  });
  return make("div", { className: "scale" }, String(Number(low.toPrecision(3))), bar, String(Number(high.toPrecision(3))));
}

function csv(page, ids, paths) {
  const quote = (value) => (/[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
  const lines = [["path", ...page.data.columns.map(({ name }) => name)]];
  ids.forEach((id, n) => lines.push([paths[n], ...page.data.columns.map((column) => valueOf(page, column, id))]));
  return lines.map((line) => line.map(quote).join(",")).join("\n") + "\n";
}

function saveText(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

const embedded = document.getElementById("data");
if (embedded) {
  const data = JSON.parse(embedded.textContent);
  window.localagg = start(data, new EmbeddedItems(data)); // for tests, and the curious
}
