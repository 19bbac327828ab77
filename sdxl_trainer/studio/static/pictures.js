// Pictures: choose a folder, read what the check says of it, edit captions and crops. Files on disk stay the truth.
import { button, choice, get, h, labelled, number, plural, post, problem, put, say, section, studio, table, trying, url } from "./core.js";

const done = []; // what Ctrl-Z takes back, the latest last
const CHANGES = { prefix: "put words first", suffix: "put words last", replace: "replace", remove: "remove a tag" };
let view = null; // the grid that is on the page

export const pictures = async (page, go) => {
  page.append(h("h1", {}, "Pictures"), h("p", { class: "muted" }, "A folder of pictures is a dataset. Captions are read from and saved to the files beside them."));
  page.append(chooser(go));
  const folder = studio.folder || studio.begun.chosen[0];
  if (!folder) return;
  studio.folder = folder;
  try {
    await folderView(page, folder);
  } catch (error) {
    page.append(problem(error));
  }
};

const open = async (path, go) => {
  const { folder } = await post("choose", { path });
  studio.folder = folder;
  studio.begun.chosen = [folder, ...studio.begun.chosen.filter((other) => other !== folder)];
  done.length = 0;
  await go();
};

const chooser = (go) => {
  const path = h("input", { type: "text", value: studio.folder, spellcheck: "false", autocomplete: "off", placeholder: "/home/me/photos" });
  const browser = h("div", { class: "browser", hidden: true });
  const form = h("form", { class: "rowed", onsubmit: (event) => (event.preventDefault(), trying(open)(path.value, go)) }, labelled("Folder on this machine", path), h("button", { class: "main" }, "Open"), button("Browse…", () => walk(browser, path, path.value || undefined)));
  const recent = studio.begun.chosen.slice(0, 6).filter((folder) => folder !== studio.folder);
  return section("Choose a folder", form, browser, recent.length ? h("p", { class: "muted" }, "Recent: ", recent.map((folder) => button(folder, () => open(folder, go), { class: "link" }))) : null, dropping(go));
};

const walk = async (browser, path, from) => {
  let at;
  try {
    at = await get("browse", { path: from });
  } catch {
    at = await get("browse");
  }
  path.value = at.path;
  const step = (name, to) => h("li", {}, button(name, () => walk(browser, path, to), { class: "link" }));
  browser.hidden = false;
  browser.replaceChildren(h("p", { class: "muted" }, `In ${at.path}`), h("ul", {}, step("↑ the folder above", at.parent), at.folders.map((name) => step(name, `${at.path}/${name}`))));
  browser.querySelector("button").focus();
};

const dropping = (go) => {
  const name = h("input", { type: "text", value: "my-pictures", autocomplete: "off" });
  const file = h("input", { type: "file", multiple: true, accept: "image/*,.heic,.heif,.txt,.caption,.json,.jsonl,.csv,.zip" });
  const bar = h("progress", { hidden: true, max: "1", value: 0, "aria-label": "Copied" });
  const send = trying(async (found) => {
    let folder = "";
    const left = [];
    bar.hidden = false;
    for (const [index, each] of found.entries()) {
      const answer = await put("upload", { folder: name.value, name: each.name }, each);
      folder = answer.folder;
      left.push(...answer.left_out);
      bar.value = (index + 1) / found.length;
    }
    if (folder) await open(folder, go);
    if (left.length) say(`${plural(left.length, "file of the archive was", "files of the archive were")} left out: ${left.slice(0, 5).join(", ")}`, true);
  });
  file.addEventListener("change", () => send([...file.files]));
  const area = h("div", { class: "drop" }, labelled("Or drop pictures, captions or a .zip here, or choose them", file), labelled("into a new folder named", name), bar);
  const over = (on) => (event) => (event.preventDefault(), area.classList.toggle("over", on));
  area.addEventListener("dragover", over(true));
  area.addEventListener("dragleave", over(false));
  area.addEventListener("drop", (event) => (over(false)(event), send([...event.dataTransfer.files])));
  return area;
};

const folderView = async (page, folder) => {
  const verdict = h("div", { "aria-live": "polite" }, h("p", { class: "muted" }, "Looking at the pictures…"));
  page.append(section("Can it be trained on?", verdict));
  const look = trying(async () => verdict.replaceChildren(judged(await get("verdict", { folder, run: studio.run }))));
  const grid = h("ul", { class: "album", "aria-label": "Pictures with their captions" });
  view = { folder, grid, look, find: "", missing: false, from: 0, count: h("p", { class: "muted", "aria-live": "polite" }), tags: h("details", {}), more: button("Show more", () => load(false)) };
  page.append(section("Captions", h("p", { class: "muted" }, "Enter saves and goes on, Escape takes back what is not saved, arrow keys move between pictures, Ctrl-Z takes back what is saved."), tools(), view.tags, view.count, grid, view.more));
  await load(true);
  look();
};

const judged = (found) => {
  const bad = found.problems.length;
  const missing = found.pictures - found.captions;
  const words = bad ? "not yet" : missing ? `${missing} without a caption` : "yes";
  const most = Math.max(1, ...found.sizes.map((size) => size.pictures));
  const bar = (count) => {
    const made = h("span", { class: "bar" });
    made.style.width = `${(100 * count) / most}%`;
    return made;
  };
  return h(
    "div",
    { class: "verdict" },
    h("p", {}, h("span", { class: `chip ${bad || missing ? "open" : "good"}` }, words), ` ${plural(found.pictures, "picture")}, ${plural(found.captions, "caption")}`),
    found.problems.map(problem),
    found.read.map((line) => h("p", { class: "muted" }, `Read with ${line}`)),
    found.small.length ? h("p", {}, `${plural(found.small.length, "picture is", "pictures are")} much smaller than trained, at ${found.for}: ${found.small.slice(0, 5).join(", ")}`) : null,
    found.cut.length ? h("p", {}, "Cut off most: ", found.cut.slice(0, 6).map((cut) => button(`${cut.name} (${Math.round(100 * cut.lost)} %)`, () => crop(cut.name), { class: "link" }))) : null,
    found.same.length ? h("p", {}, `${found.same[0].pictures} pictures have the same caption: “${found.same[0].caption}”`) : null,
    found.sizes.length ? h("details", {}, h("summary", {}, found.sizes.length === 1 ? "One size at which they are trained" : `${found.sizes.length} sizes at which they are trained`), table("Sizes", ["size", "pictures", ""], found.sizes.map((size) => [`${size.width} × ${size.height}`, number(size.pictures), bar(size.pictures)]))) : null,
    found.looked_at < found.pictures ? h("p", { class: "muted" }, `The first ${number(found.looked_at)} were looked at; sdxl check looks at all.`) : null,
  );
};

const tools = () => {
  const find = h("input", { type: "search", autocomplete: "off" });
  const missing = h("input", { type: "checkbox" });
  const again = () => (Object.assign(view, { find: find.value, missing: missing.checked }), load(true));
  view.found = () => ((find.value = view.find), (some.hidden = !view.find && !view.missing));
  find.addEventListener("change", again);
  missing.addEventListener("change", again);
  const kind = choice(Object.entries(CHANGES), "prefix");
  const words = h("input", { type: "text", autocomplete: "off" });
  const by = h("input", { type: "text", autocomplete: "off" });
  const second = labelled("by", by);
  const fit = () => (second.hidden = kind.value !== "replace");
  kind.addEventListener("change", fit);
  fit();
  const sent = (apply) => ({ folder: view.folder, kind: kind.value, words: words.value, find: words.value, by: by.value, among: view.find, missing: view.missing, apply });
  const preview = h("div", { "aria-live": "polite" });
  const some = h("p", { class: "muted", hidden: true }, "Only those that are found above are changed.");
  const look = async () => {
    const found = await post("change", sent(false));
    const first = Object.keys(found.new).slice(0, 8);
    preview.replaceChildren(h("p", {}, `${plural(found.changed, "caption")} would change.`), first.length ? table("Preview", ["picture", "now", "then"], first.map((name) => [name, found.old[name], found.new[name]])) : "");
  };
  const apply = async () => {
    const found = await post("change", sent(true));
    if (found.changed) done.push({ captions: found.old, before: found.new });
    preview.replaceChildren();
    say(`${plural(found.changed, "caption")} changed; Ctrl-Z takes it back`);
    await load(true);
    view.look();
  };
  return h(
    "div",
    {},
    h("div", { class: "rowed" }, labelled("Find", find), h("label", { class: "check" }, missing, "without a caption only"), button("Take back", undo)),
    h("details", {}, h("summary", {}, "Change all captions"), h("div", { class: "rowed" }, labelled("Change", kind), labelled("words", words), second, button("Preview", look), button("Apply", apply, { class: "main" })), some, preview),
  );
};

const load = async (anew) => {
  const from = anew ? 0 : view.from;
  const found = await get("pictures", { folder: view.folder, find: view.find, missing: view.missing ? 1 : "", from });
  if (anew) view.grid.replaceChildren();
  view.grid.append(...found.pictures.map(card));
  view.from = from + found.pictures.length;
  view.more.hidden = view.from >= found.found;
  view.found();
  view.count.textContent = `${number(view.from)} of ${number(found.found)} shown${found.found < found.all ? `, ${number(found.all)} in the folder` : ""}`;
  view.tags.replaceChildren(h("summary", {}, "Most frequent tags"), h("p", { class: "frequent" }, found.tags.map(([tag, count]) => button(`${tag.slice(0, 60)} ${count}`, () => ((view.find = tag), load(true)), { class: "link" }))));
  rove(view.grid.querySelector("li"));
};

const card = (picture) => {
  const source = url("thumbnail", { folder: view.folder, name: picture.name });
  const text = h("textarea", { rows: "3", "aria-label": `Caption of ${picture.name}`, maxlength: "20000", readonly: picture.readonly, spellcheck: "false" });
  text.value = picture.caption;
  const state = h("small", { "aria-live": "polite" }, picture.readonly ?? (picture.source || "no caption yet"));
  const save = trying(async () => {
    const [before, now] = [picture.caption, text.value.trim()];
    if (now === before) return;
    state.textContent = "saving…";
    try {
      await post("caption", { folder: view.folder, captions: { [picture.name]: now }, before: { [picture.name]: before } });
    } catch (error) {
      state.textContent = "not saved";
      throw error;
    }
    done.push({ captions: { [picture.name]: before }, before: { [picture.name]: now } });
    picture.caption = now;
    state.textContent = "saved";
  });
  text.addEventListener("blur", save);
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      const next = item.nextElementSibling?.querySelector("textarea");
      if (next) next.focus();
      else save();
    } else if (event.key === "Escape") {
      text.value = picture.caption;
      item.focus();
    }
    if (event.key !== "Tab") event.stopPropagation();
  });
  const image = h("img", { src: source, alt: picture.caption.slice(0, 200) || picture.name, loading: "lazy", width: "256", height: "256" });
  const item = h("li", { class: "card", tabindex: "-1", "data-name": picture.name, "aria-label": picture.name }, h("button", { type: "button", class: "look", title: "See and move the crop", onclick: trying(() => crop(picture.name)) }, image), h("span", { class: "file" }, picture.name), text, state);
  item.addEventListener("keydown", arrows);
  return item;
};

const rove = (item) => {
  for (const other of view.grid.querySelectorAll('li[tabindex="0"]')) other.tabIndex = -1;
  if (item) item.tabIndex = 0;
  return item;
};
const arrows = (event) => {
  const item = event.currentTarget;
  if (event.target !== item) return;
  const items = [...view.grid.children];
  const columns = items.filter((other) => other.offsetTop === items[0].offsetTop).length;
  const stride = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (event.key === "Enter") item.querySelector("textarea").focus();
  else if (stride) rove(items[Math.min(Math.max(items.indexOf(item) + stride, 0), items.length - 1)]).focus();
  else return;
  event.preventDefault();
};

const undo = async () => {
  const last = done.pop();
  if (!last) return say("there is nothing to take back");
  if (last.focus !== undefined) await post("focus", { folder: view.folder, ...last });
  else await post("caption", { folder: view.folder, ...last });
  await load(true);
  view.look();
  say("taken back");
};
addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, dialog");
  if (!typing && view?.grid.isConnected && event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    trying(undo)();
  }
});

/** The crops of a picture over it, and the point that they keep, moved by click or arrow keys. */
const crop = async (name) => {
  const place = h("div", { class: "frame", tabindex: "0", role: "application", "aria-label": "Point that the crop keeps: move it with the arrow keys" });
  const words = h("p", { class: "muted", "aria-live": "polite" });
  const dialog = h("dialog", { "aria-label": `Crop of ${name}` }, h("h2", {}, name), words, place, h("p", { class: "rowed" }, button("Plain crop", () => move(null)), button("Close", () => dialog.close(), { class: "main" })));
  let now;
  const draw = async () => {
    now = await get("crops", { folder: view.folder, name, run: studio.run });
    const [wide, tall] = now.size;
    const sizes = [...new Set(now.crops.map((each) => each.size.join(" × ")))].join(", ");
    words.textContent = `${wide} × ${tall} pixels, trained at ${sizes}; ${Math.round(100 * now.lost)} % is cut off. Click to name the point that the crop keeps.${now.beside ? " Points are kept in a metadata.jsonl, which then holds the captions too." : ""}`;
    place.replaceChildren(h("img", { src: url("thumbnail", { folder: view.folder, name, large: 1 }), alt: name }), ...now.crops.map(({ box }) => boxed(box)), point(now.focus));
  };
  const move = async (focus) => {
    const before = now.focus;
    await post("focus", { folder: view.folder, name, focus });
    done.push({ name, focus: before });
    await draw();
  };
  place.addEventListener("click", trying((event) => {
    const box = place.getBoundingClientRect();
    return move([(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]);
  }));
  place.addEventListener("keydown", trying((event) => {
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    if (x === undefined) return;
    event.preventDefault();
    const at = now.focus ?? [0.5, 0.5];
    return move([at[0] + x * 0.04, at[1] + y * 0.04].map((share) => Math.min(Math.max(share, 0), 1)));
  }));
  await draw();
  document.body.append(dialog);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.showModal();
};
const boxed = ([left, top, wide, tall]) => {
  const made = h("i", { class: "box" });
  for (const [side, share] of Object.entries({ left, top, width: wide, height: tall })) made.style[side] = `${100 * share}%`;
  return made;
};
const point = (focus) => {
  const made = h("i", { class: "point", hidden: !focus });
  if (focus) [made.style.left, made.style.top] = focus.map((share) => `${100 * share}%`);
  return made;
};
