// Settings: three questions make a config; its form, its text and its difference from how it began; what it will cost.
import { button, choice, command, get, h, labelled, number, post, problem, Refused, runs, say, section, show, studio, table, trying, watch } from "./core.js";

let making = false;
let sought = ""; // what is looked for among the options

export const settings = async (page, go) => {
  page.append(h("h1", {}, "Settings"));
  making ||= Boolean(studio.copied);
  const chooser = runs("Settings of", () => ((making = false), go()));
  if (chooser) page.append(h("div", { class: "rowed" }, chooser, button("Start something new", () => ((making = true), go()))));
  if (making || !chooser) return page.append(beginning(go));
  await form(page, go);
};

const beginning = (go) => {
  const { presets, chosen, runs: others } = studio.begun;
  const folder = choice(chosen.map((path) => [path]), studio.folder || chosen[0]);
  const what = choice(presets.map((preset) => [preset.name, `${preset.what} (${number(preset.pictures[0])} to ${number(preset.pictures[1])} pictures)`]), presets.find((preset) => preset.name.startsWith("lora-character"))?.name);
  const card = choice([["", "24 GB or more, or I do not know"], ["small", "8 to 12 GB"], ["middle", "16 GB"]], "");
  const fits = () => {
    const [small, whole] = [presets.find((preset) => preset.name.startsWith("lora-low-memory")), what.value.startsWith("full")];
    if (small && (card.value === "small" || (card.value === "middle" && whole))) what.value = small.name;
    preview();
  };
  const model = h("input", { type: "text", value: "stabilityai/stable-diffusion-xl-base-1.0", spellcheck: "false", autocomplete: "off" });
  const micro = h("input", { type: "checkbox" });
  const trigger = h("input", { type: "text", autocomplete: "off" });
  const name = h("input", { type: "text", value: "first", autocomplete: "off", spellcheck: "false" });
  const copied = choice([["", "no: from a preset"], ...studio.now.runs.map((run) => [run.name])], studio.copied);
  const other = h("input", { type: "file", accept: ".json,.toml,.yaml,.yml,.sh,.bat" });
  studio.copied = "";
  const shown = h("div", { "aria-live": "polite" });
  const values = h("details", { open: true }, h("summary", {}, "Values that it sets"), shown);
  const sent = () => ({ folder: folder.value, preset: what.value, model: model.value, micro: micro.checked, trigger: trigger.value, name: name.value, copy: copied.value });
  const preview = trying(async () => {
    const elsewhere = copied.value || other.files.length;
    fresh.hidden = Boolean(elsewhere);
    values.hidden = Boolean(elsewhere) || !folder.value;
    model.disabled = micro.checked;
    if (elsewhere || !folder.value) return;
    const found = await post("preview", sent());
    shown.replaceChildren(table("Values that it sets", ["option", "value", "because"], found.values.map(({ key, is }) => [key, JSON.stringify(is), found.notes[key] ?? ""])), command(found.command, "The same as a command: writes this config and trains it"));
  });
  card.addEventListener("change", fits);
  for (const field of [folder, what, model, micro, trigger, copied, other, name]) field.addEventListener("change", preview);
  const make = async () => {
    const [file] = other.files;
    const made = await post("start", file ? { name: name.value, file: file.name, text: await file.text() } : sent());
    studio.run = made.name;
    studio.told = { name: made.name, file: file?.name, lines: made.told };
    making = false;
    studio.now = await get("watched");
    await go();
  };
  const first = h("p", {}, "Choose a folder of pictures first: ", h("a", { href: "#pictures" }, "Pictures"), ".");
  const fresh = !chosen.length ? first : h("div", { class: "form" },
      labelled("What is to be learned?", what),
      labelled("From which pictures?", folder),
      labelled("How much memory has the graphics card?", card, "a small card gets the preset that it can hold; the check reckons it exactly"),
      labelled("Words that call it up", trigger, "for example sks dog: captions that lack them get them first, pictures without a caption get one. Empty: the captions as they are"),
      labelled("On which model?", model, "a name on the hub, a folder, or one .safetensors file"),
      h("label", { class: "check" }, micro, "micro-SDXL, which comes with the package: to try the studio without a graphics card"),
  );
  preview();
  return section(
    "Something new",
    h("form", { class: "form", onsubmit: (event) => (event.preventDefault(), trying(make)()) },
      fresh,
      labelled("With the settings of another run?", copied),
      labelled("Or from a config of kohya, OneTrainer, SimpleTuner, ai-toolkit or diffusers?", other, "what becomes of each of its options is said, and written into the new one"),
      labelled("Name of the run", name),
      h("button", { class: "main" }, "Make the config")),
    values,
  );
};

const form = async (page, go) => {
  const name = studio.run;
  const [place, start] = [h("div", {}), before(name)];
  if (studio.told?.name === name && studio.told.lines.length) page.append(h("details", { open: true }, h("summary", {}, `What became of ${studio.told.file}`), h("pre", { class: "log", tabindex: "0" }, studio.told.lines.join("\n"))));
  page.append(place, start.place);
  const draw = (state) => {
    place.replaceChildren(...parts(state, save, go));
    start.update(state);
    if (sought) seek(place.querySelector("#find-option"), place.querySelector(".options"));
  };
  const save = async (change) => {
    const state = await post("config", { name, ...change });
    const at = document.activeElement?.id;
    const open = [...place.querySelectorAll("details[open]")].map((part) => part.dataset.part);
    draw(state);
    for (const part of place.querySelectorAll("details")) part.open = open.includes(part.dataset.part);
    if (at) document.getElementById(at)?.focus();
    say(state.problem ? "saved, with a problem" : "saved", Boolean(state.problem));
  };
  try {
    draw(await get("config", { name }));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    place.append(problem(error));
  }
};

const parts = (state, save, go) => {
  const { fields, first } = studio.begun;
  const all = fields.flatMap((field) => entries(field, state.tree).map((key) => ({ ...field, key })));
  const changed = new Set(state.changes.map((change) => change.key));
  const cell = (place) => (field) => input(field, state.tree, changed.has(field.key), save, place);
  const names = [...new Set(fields.map((field) => field.section))];
  const counted = (part) => {
    const own = state.changes.filter(({ key }) => (key.includes(".") ? key.split(".")[0] : "") === part).length;
    return own ? h("small", {}, ` ${own} changed`) : null;
  };
  const options = h("div", { class: "options" }, names.map((part) => h("details", { "data-part": part }, h("summary", {}, part ? `[${part}]` : "top of the file", counted(part)), h("div", { class: "form" }, all.filter((field) => field.section === part).map(cell("option"))))));
  const find = h("input", { type: "search", autocomplete: "off", id: "find-option", value: sought, oninput: () => seek(find, options) });
  const area = h("textarea", { rows: "24", spellcheck: "false", class: "code", "aria-label": "Config as TOML" });
  area.value = state.toml;
  return [
    state.problem ? problem(state.problem, state.name, go) : null,
    section("The usual ones", h("div", { class: "form" }, first.map((key) => all.find((field) => field.key === key)).filter(Boolean).map(cell("usual"))), state.effective ? h("p", { class: "muted" }, `Effective learning rate ${state.effective}: adapters of other ranks compare by it.`) : null),
    section("All options", labelled("Find an option", find), h("details", { "data-part": "(all)" }, h("summary", {}, `All ${all.length} of them, by section`, state.changes.length ? h("small", {}, ` ${state.changes.length} changed`) : null), options)),
    section("The file",
      state.changes.length ? h("details", { "data-part": "(changes)" }, h("summary", {}, state.changes.length === 1 ? "One value differs from how it began" : `${state.changes.length} values differ from how it began`), table("Differences", ["option", "was", "is"], state.changes.map(({ key, was, is }) => [key, JSON.stringify(was) ?? "default", JSON.stringify(is) ?? "default"]))) : h("p", { class: "muted" }, "As it began."),
      h("details", { "data-part": "(text)" }, h("summary", {}, "As text"), area, h("p", { class: "rowed" }, button("Save the text", () => save({ toml: area.value }), { class: "main" })))),
  ].filter(Boolean);
};

/** Show the options in whose name or meaning the words are. */
const seek = (find, options) => {
  sought = find.value;
  const words = sought.toLowerCase().split(/\s+/).filter(Boolean);
  for (const part of options.children) {
    const fields = [...part.querySelectorAll(".field")];
    for (const field of fields) field.hidden = !words.every((word) => field.textContent.toLowerCase().includes(word));
    part.hidden = !fields.some((field) => !field.hidden);
    part.open = Boolean(words.length) && !part.hidden;
  }
  options.closest("details").open = Boolean(words.length);
};

/** The keys under which an option stands: one for each entry of a list of sections. */
const entries = ({ section: part, name, list }, tree) => {
  if (!part) return [name];
  return list ? (Array.isArray(tree[part]) ? tree[part].map((_, index) => `${part}.${index}.${name}`) : []) : [`${part}.${name}`];
};
const valueAt = (tree, key) => key.split(".").reduce((node, step) => node?.[step], tree);

const input = (field, tree, changed, save, place) => {
  const value = valueAt(tree, field.key);
  const id = `${place}-${field.key.replaceAll(".", "-")}`;
  const store = trying((event) => save({ changes: { [field.key]: read(field, event.target.value) } }));
  const rest = field.default === null || field.default === undefined ? "" : typeof field.default === "object" ? JSON.stringify(field.default) : String(field.default);
  let made;
  if (field.kind === "boolean" || (field.choices && field.kind !== "array")) {
    const known = field.choices ?? ["true", "false"];
    const options = [...new Set(value === undefined ? known : [...known, String(value)])].map((option) => [option]);
    made = choice([["", `default${rest ? `: ${rest}` : ""}`], ...options], value === undefined ? "" : String(value), { id, onchange: store });
  } else if (field.kind === "array" || field.kind === "json") {
    made = h("textarea", { id, rows: "2", placeholder: rest, spellcheck: "false", onchange: store });
    made.value = value === undefined ? "" : Array.isArray(value) && field.kind === "array" ? value.join("\n") : JSON.stringify(value);
  } else {
    const numeric = field.kind === "integer" || field.kind === "number";
    made = h("input", { id, type: "text", inputmode: numeric ? "decimal" : null, placeholder: rest, autocomplete: "off", spellcheck: "false", onchange: store, list: field.suggestions ? `${id}-known` : null });
    made.value = value ?? "";
  }
  const signs = { minimum: "≥", exclusiveMinimum: ">", maximum: "≤", exclusiveMaximum: "<", multipleOf: "multiple of" };
  const limits = Object.entries(field.limits).map(([limit, bound]) => `${signs[limit]} ${number(bound)}`);
  const whole = labelled(field.key, made, [field.description, ...limits, field.kind === "array" ? "one a line" : ""].filter(Boolean).join("; "));
  if (field.suggestions) whole.append(h("datalist", { id: `${id}-known` }, field.suggestions.map((name) => h("option", { value: name }))));
  if (changed) whole.querySelector("label").append(h("span", { class: "dot", title: "differs from how it began" }, " ●"));
  return whole;
};

/** What was written into a field, as the option's kind of value; null: its default. What is no number is left to the
    config's own check, which says what it should be. */
const read = (field, text) => {
  const plain = (line) => (line === "" || Number.isNaN(Number(line)) ? line : Number(line));
  if (text === "") return null;
  if (field.kind === "boolean") return text === "true";
  if (["integer", "number", "steps"].includes(field.kind)) return plain(text);
  if (field.kind === "array") return text.split("\n").filter(Boolean).map((line) => (field.items === "string" ? line : plain(line)));
  if (field.kind !== "json") return text;
  try {
    return JSON.parse(text);
  } catch {
    throw new Refused({ what: `${field.key} is not JSON`, where: field.key, fix: 'write for example {"a": 1}' });
  }
};

const SAID = {
  none: "Not checked yet: the check says what would stop it, and what it takes of memory, disk and steps.",
  old: "The settings have changed since the last check.",
  running: "Looking: it opens each picture and reads each caption as the model will…",
  passed: "Nothing stops it.",
  stops: "The last check found what stops it. Mend it, in the settings or in the pictures, and check again.",
};
/** Before anything is spent: what the check says, and the start, which is closed while that would stop the run. */
const before = (name) => {
  const [line, report] = [h("div", { "aria-live": "polite" }), h("div", { class: "inner" })];
  let state = null, told = "", since = 0, asked = false;
  const look = trying(async () => {
    const { html, written } = await get("checked", { name });
    if (html && written > since) show(report, html);
    else report.replaceChildren(h("p", { class: "muted" }, "It got no further than what is said above."));
    why.hidden = true;
  });
  const check = button("Check", async () => {
    asked = true;
    report.replaceChildren();
    await post("check", { name });
  });
  const start = button("Start", async () => {
    await post("train", { name });
    studio.run = name;
    location.hash = "#training";
  }, { class: "main" });
  const why = button("See the report of the check", look, { hidden: true });
  const same = h("div", {});
  const draw = () => {
    const run = studio.now.runs.find((other) => other.name === name);
    const standing = run?.check ?? { state: "none" };
    check.disabled = Boolean(state?.problem) || standing.state === "running";
    start.disabled = check.disabled || standing.state === "stops";
    const drawing = JSON.stringify([standing, Boolean(state?.problem)]);
    if (drawing === told) return;
    told = drawing;
    const known = ["passed", "stops"].includes(standing.state);
    why.hidden = !known;
    since = standing.since ?? 0;
    if (known && asked) look();
    asked &&= !known;
    if (standing.state === "old") report.replaceChildren();
    line.replaceChildren(
      h("p", {}, known ? [h("span", { class: `chip ${standing.state === "passed" ? "good" : "bad"}` }, standing.state === "passed" ? "checked" : "stopped"), " "] : null, state?.problem ? "Mend the problem above first." : SAID[standing.state]),
      standing.problem ? problem(standing.problem, name, reload) : "",
    );
  };
  const reload = () => dispatchEvent(new HashChangeEvent("hashchange"));
  const update = (now) => {
    state = now;
    same.replaceChildren(...now.commands.map((text) => command(text)));
    draw();
  };
  watch(draw);
  return { place: section("Before it starts", line, h("p", { class: "rowed" }, check, start, why), report, h("p", { class: "muted" }, "The same in a terminal:"), same), update };
};
