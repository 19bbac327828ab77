// What every page uses: elements without markup from data, requests, messages, commands to copy, the state of what runs.

/** An element. Text is only ever text: nothing from a caption, prompt or file name can become markup. */
export const h = (tag, given = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
};

/** Put a part of the report into an element; the server has escaped whatever is in it. */
export const show = (place, html) => {
  place.innerHTML = html;
  for (const title of place.querySelectorAll("h1")) title.replaceWith(h("h2", { class: "title" }, ...title.childNodes)); // a page has one
  for (const wire of [wireCurves, wireScales, wirePictures, wireCopies]) wire(place);
};

export class Refused extends Error {
  constructor({ what, where, fix }) {
    super(what);
    Object.assign(this, { what, where, fix });
  }
}

const query = (given) =>
  Object.entries(given)
    .filter(([, value]) => value !== undefined && value !== null && value !== "" && value !== false)
    .map(([name, value]) => `${name}=${encodeURIComponent(String(value).toWellFormed?.() ?? value)}`)
    .join("&");
export const url = (path, given = {}) => `/api/${path}?${query(given)}`;

const answered = async (response) => {
  if (response.ok) return response.json();
  const json = response.headers.get("content-type")?.startsWith("application/json");
  throw new Refused(json ? await response.json() : { what: await response.text(), where: "studio", fix: "" });
};
const asked = async (...request) => {
  try {
    return await fetch(...request);
  } catch {
    throw new Refused({ what: "the studio does not answer", where: "sdxl ui", fix: "start it again in the terminal" });
  }
};
export const get = async (path, given) => answered(await asked(url(path, given)));
export const post = async (path, body) =>
  answered(await asked(`/api/${path}`, { method: "POST", headers: { "x-studio": "1" }, body: JSON.stringify(body) }));
export const put = async (path, given, body) =>
  answered(await asked(url(path, given), { method: "PUT", headers: { "x-studio": "1" }, body }));

/** Say something at the foot of the page, where screen readers hear it too. */
let quiet;
export const say = (text, bad = false) => {
  const place = document.getElementById("said");
  place.textContent = text;
  place.className = bad ? "bad" : "";
  clearTimeout(quiet);
  quiet = setTimeout(() => (place.textContent = ""), bad ? 12000 : 4000);
};
/** A handler whose refusals are said, with how to mend them. */
export const trying = (work) => async (...given) => {
  try {
    return await work(...given);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say([error.what, error.fix].filter(Boolean).join(": "), true);
    return undefined;
  }
};

export const problem = ({ what, where, fix }, name, after) => {
  const buttons = h("span", { class: "rowed", hidden: true });
  if (name && fix) offered(buttons, name, what, fix, after);
  return h("div", { class: "problem", role: "group", "aria-label": "Problem" }, h("b", {}, what), h("small", {}, `at: ${where}`), h("span", {}, `To mend it: ${fix}`), buttons);
};
/** Buttons that make the changes of the config which the fix names, as far as they would mend it. */
const offered = trying(async (place, name, what, fix, after) => {
  const found = await get("advised", { name, what, fix });
  const change = ({ words, changes }) => async () => {
    await post("config", { name, changes });
    say(`saved in the settings: ${words}`);
    await after?.();
  };
  place.replaceChildren(...found.map((each) => button(each.words, change(each), { class: "mend" })));
  place.hidden = !found.length;
});

/** A command that does the same in a terminal. */
export const command = (text, label = "The same as a command") => {
  const block = h(
    "div",
    { class: "block" },
    h("pre", { tabindex: "0", role: "region", "aria-label": label }, h("code", {}, text)),
    h("button", { type: "button", class: "copy" }, "Copy"),
  );
  wireCopies(h("div", {}, block));
  return block;
};

export const labelled = (text, field, hint) => {
  field.id ||= `field-${Math.random().toString(36).slice(2)}`;
  const note = hint ? h("small", { id: `${field.id}-hint` }, hint) : null;
  if (note) field.setAttribute("aria-describedby", note.id);
  return h("div", { class: "field" }, h("label", { for: field.id }, text), field, note);
};
export const choice = (options, value, given = {}) => {
  const made = h("select", given, options.map(([key, text]) => h("option", { value: key }, text ?? key)));
  made.value = value;
  return made;
};
export const button = (text, work, given = {}) => h("button", { type: "button", onclick: trying(work), ...given }, text);
export const section = (title, ...children) => {
  const id = `part-${title.toLowerCase().replace(/\W+/g, "-")}`;
  return h("section", { "aria-labelledby": id }, h("h2", { id }, title), ...children);
};
export const table = (label, headings, rows) =>
  h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, headings.map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell))))),
    ),
  );

export const number = (value) => (value === null || value === undefined ? "–" : said(value));
export const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;
export const lasting = (seconds) => {
  const whole = Math.round(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
};
export const STATES = {
  new: "not begun",
  queued: "waiting",
  running: "running",
  pausing: "about to pause",
  paused: "paused",
  done: "done",
  stopped: "stopped",
  failed: "failed",
  lost: "ended unseen",
};
export const chip = (state) => h("span", { class: `chip ${{ done: "good", failed: "bad", lost: "bad" }[state] ?? "open"}` }, STATES[state] ?? state);

/** What the pages share: what the server told at the start, what runs now, the folder and the run in hand. */
export const studio = { begun: null, now: { jobs: [], runs: [] } };
const kept = (name) => ({
  get: () => sessionStorage.getItem(name) ?? "",
  set: (value) => sessionStorage.setItem(name, value),
});
Object.defineProperties(studio, { folder: kept("folder"), run: kept("run"), copied: kept("copied") });

const listeners = new Set();
/** Call `work` whenever something that runs has changed, until the page is left. */
export const watch = (work) => {
  listeners.add(work);
  work(studio.now);
};
export const unwatch = () => listeners.clear();
export const listen = () => {
  const source = new EventSource("/api/events");
  source.onmessage = (event) => {
    studio.now = JSON.parse(event.data);
    const running = studio.now.jobs.filter((job) => job.state === "running");
    document.getElementById("now").textContent = running.map((job) => `${job.kind} ${job.name}`).join(", ");
    for (const work of listeners) work(studio.now);
  };
  source.onerror = () => (document.getElementById("now").textContent = "the studio does not answer");
};
/** Wait until a job has ended; refused with its message if it failed. */
export const ended = (job) =>
  new Promise((resolve, reject) => {
    const look = (now) => {
      const found = now.jobs.find((other) => other.id === job.id);
      if (!found || found.state === "queued" || found.state === "running") return;
      listeners.delete(look);
      if (found.state === "done") resolve(found);
      else reject(new Refused(found.problem ?? { what: `the command was ${STATES[found.state]}`, where: job.command, fix: "" }));
    };
    watch(look);
  });

/** Choose the run that a page is about. */
export const runs = (title, go) => {
  const names = studio.now.runs.map((run) => run.name);
  if (!names.includes(studio.run)) studio.run = names[0] ?? "";
  if (!names.length) return null;
  return labelled(
    title,
    choice(
      names.map((name) => [name]),
      studio.run,
      { onchange: (event) => ((studio.run = event.target.value), go()) },
    ),
  );
};
