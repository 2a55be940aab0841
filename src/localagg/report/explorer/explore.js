// The page of `localagg explore`: the map of all images, whose data a server on this machine gives.
// It follows map.js and page.js in one script.

const PICTURES = 3000; // that are kept decoded

/** Send a request; raises the server's sentence if it is refused. */
async function ask(place, body) {
  const answer = await fetch(place, body === undefined ? {} : { method: "POST", body });
  if (answer.ok) return answer;
  throw new Error((await answer.json().catch(() => null))?.error ?? `The server answered ${answer.status}.`);
}

const askJson = async (place, body) => (await ask(place, body)).json();

/** Items whose pictures and neighbors the server gives one by one. */
class ServedItems extends EmbeddedItems {
  pictures = new Map();

  array(name, Type) {
    const buffer = this.data.arrays[name];
    return buffer ? new Type(buffer) : null;
  }

  details(id) {
    return askJson(`details/${id}`);
  }

  paths(ids) {
    return ids.length ? askJson("paths", JSON.stringify(ids)) : [];
  }

  #picture(id) {
    let picture = this.pictures.get(id);
    if (!picture) {
      picture = make("img", { src: `picture/${id}/96` });
      this.pictures.set(id, picture);
      if (this.pictures.size > PICTURES) this.pictures.delete(this.pictures.keys().next().value);
    }
    return picture;
  }

  sizeIn(id, box) {
    const { complete, naturalWidth: width, naturalHeight: height } = this.#picture(id);
    if (!complete) return [box, box];
    return width ? [(width * box) / Math.max(width, height), (height * box) / Math.max(width, height)] : null;
  }

  draw(context, id, x, y, box, again) {
    const picture = this.#picture(id), size = this.sizeIn(id, box);
    if (!picture.complete) picture.addEventListener("load", again, { once: true });
    else if (size) context.drawImage(picture, x - size[0] / 2, y - size[1] / 2, ...size);
    return size;
  }

  thumbnail(id, box, lazily = false) {
    const picture = make("img", { alt: "", loading: lazily ? "lazy" : "eager", src: `picture/${id}/${box > 96 ? 320 : 96}` });
    Object.assign(picture.style, { width: `${box}px`, height: `${box}px` });
    picture.addEventListener("error", () => (picture.className = "missing"));
    return picture;
  }
}

/** Add tools to the map: above it search by text or picture, beside the selection its label. */
function addTools(page) {
  const said = make("span", { className: "note", role: "status" }), results = make("div", { className: "pictures results" });
  const tool = (text, input, action) => {
    const form = make("form", { className: "tools" }, make("label", {}, `${text} `, input));
    const act = async (event) => {
      event.preventDefault();
      said.textContent = "…";
      try {
        said.textContent = await action();
      } catch (error) {
        said.textContent = error.message;
      }
    };
    form.addEventListener("submit", act);
    if (input.type === "file") input.addEventListener("change", act);
    return form;
  };
  const text = make("input", { type: "search", required: true }), file = make("input", { type: "file", accept: "image/*" });
  const label = make("input", { type: "text", maxLength: 200 });
  const counted = (count) => `${count.toLocaleString("en")} image${count === 1 ? "" : "s"}`;

  const find = tool("Find paths", text, async () => {
    const ids = await askJson(`find?text=${encodeURIComponent(text.value)}`);
    page.select(ids);
    if (ids.length) page.pick(ids[0]), page.map.show(ids[0], ids.length === 1);
    return ids.length ? `Selected ${counted(ids.length)}.` : "No path contains this text.";
  });
  const search = tool("Search by a picture", file, async () => {
    if (!file.files.length) return "";
    const near = await askJson("search", file.files[0]);
    const open = (id) => (page.pick(id), page.map.show(id, true));
    results.replaceChildren(...near.map(([id, s]) => pictureButton(page, id, [s.toFixed(2)], 56, () => open(id))));
    page.select(near.map(([id]) => id));
    return "The most similar images, by cosine; they are selected.";
  });
  const typed = page.data.columns.at(-1);
  const save = tool("Label the selection", label, async () => {
    typed.names = await askJson("label", JSON.stringify({ ids: page.selection, label: label.value }));
    typed.values = new Uint16Array(await (await ask(`array/${typed.array}`)).arrayBuffer());
    page.paint();
    return `Saved the label of ${counted(page.selection.length)} in ${page.data.labels}.`;
  });
  save.append(make("button", { textContent: "Save label" }));
  find.append(make("button", { textContent: "Find" }));
  page.selectionTools.push(save);
  document.querySelector(".map-part .tools").before(make("div", { className: "tools" }, find, search, said));
  document.querySelector(".map").before(results);
}

async function explore() {
  const parts = document.getElementById("parts");
  try {
    const data = await askJson("data");
    const names = ["xy", ...data.columns.map(({ array }) => array)];
    const buffers = await Promise.all(names.map(async (name) => (await ask(`array/${encodeURIComponent(name)}`)).arrayBuffer()));
    data.arrays = Object.fromEntries(names.map((name, n) => [name, buffers[n]]));
    const page = start(data, new ServedItems(data));
    addTools(page);
    window.localagg = page;
  } catch (error) {
    parts.append(make("p", { textContent: error.message }));
  }
}

explore();
