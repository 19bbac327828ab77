// Try: prompts on the base, any checkpoint or the result, also while it trains. Compare: two runs side by side.
import { command, ended, get, h, labelled, number, post, problem, Refused, runs, section, show, studio, table, trying, url } from "./core.js";

const kept = []; // trials of this visit, the latest first

export const tries = async (page, go) => {
  page.append(h("h1", {}, "Try"), h("p", { class: "muted" }, "Each picture begins with the same noise wherever its seed is the same, so that what differs is what was learned."));
  const chooser = runs("Run", go);
  if (!chooser) return page.append(h("p", {}, "There is no run yet. ", h("a", { href: "#settings" }, "Make a config"), " first."));
  const found = await get("run", { name: studio.run });
  const models = [["base", "the base model"], ...found.checkpoints.map((step) => [step, `step ${number(step)}`]), ...(found.result ? [["result", "the result"]] : [])];
  const boxes = models.map(([key, text], index) => {
    const box = h("input", { type: "checkbox", checked: index === 0 || index === models.length - 1 });
    return { key, text, box, label: h("label", { class: "check" }, box, text) };
  });
  const fields = {
    prompt: h("textarea", { rows: "3", maxlength: "5000" }),
    negative: h("input", { type: "text", autocomplete: "off" }),
    seed: h("input", { type: "number", value: "0", min: "0", step: "1" }),
    images: h("input", { type: "number", value: "1", min: "1", max: "16", step: "1" }),
    steps: h("input", { type: "number", value: "25", min: "1", step: "1" }),
    guidance: h("input", { type: "number", value: "5", min: "0", step: "0.5" }),
    weight: h("input", { type: "number", value: "1", step: "0.1" }),
  };
  fields.prompt.value = found.prompt ?? "";
  const results = h("div", { "aria-live": "polite" });
  const redraw = () => results.replaceChildren(...kept.map(shownTrial));
  const draw = async () => {
    const plain = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.type === "number" ? (field.value === "" ? null : Number(field.value)) : field.value]));
    const chosen = boxes.filter(({ box }) => box.checked);
    if (!chosen.length) throw new Refused({ what: "no model is chosen", where: "", fix: "choose one or several" });
    const trial = { run: studio.run, prompt: plain.prompt, columns: [] };
    for (const { key, text } of chosen) {
      const job = await post("sample", { ...plain, run: studio.run, at: key });
      trial.columns.push({ text, job, pictures: null, problem: null });
    }
    kept.unshift(trial);
    redraw();
    await Promise.all(
      trial.columns.map(async (column) => {
        try {
          await ended(column.job);
          column.pictures = (await get("tried", { try: column.job.try })).pictures;
        } catch (error) {
          if (!(error instanceof Refused)) throw error;
          column.problem = error;
        }
        redraw();
      }),
    );
  };
  page.append(
    h("div", { class: "rowed" }, chooser),
    h("form", { class: "form", onsubmit: (event) => (event.preventDefault(), trying(draw)()) },
      labelled("Prompts, one a line", fields.prompt),
      labelled("What not to draw", fields.negative),
      h("div", { class: "rowed" }, labelled("Seed", fields.seed), labelled("Pictures each", fields.images), labelled("Steps", fields.steps), labelled("Guidance", fields.guidance), found.adapter ? labelled("Strength", fields.weight) : null),
      h("fieldset", {}, h("legend", {}, "Drawn by"), boxes.map(({ label }) => label)),
      h("button", { class: "main" }, "Draw")),
    section("Drawn", results),
  );
  redraw();
};

const shownTrial = (trial) => {
  const first = trial.columns.find((column) => column.pictures)?.pictures ?? [];
  const cell = (column, index) => {
    const row = column.pictures?.[index];
    if (!row) return column.problem ? "–" : "…";
    return h("a", { href: url("tried-file", { try: column.job.try, file: row.file }), target: "_blank", rel: "noopener", title: JSON.stringify(row) }, h("img", { src: url("tried-file", { try: column.job.try, file: row.file }), alt: `${column.text}, seed ${row.seed}: ${row.prompt.slice(0, 120)}`, width: String(row.width), height: String(row.height) }));
  };
  const waits = first.length ? first : [{ prompt: trial.prompt, seed: "" }];
  return h(
    "article",
    { class: "prompt trial" },
    table("Pictures by model", ["", ...trial.columns.map((column) => column.text)], waits.map((row, index) => [h("span", {}, h("bdi", {}, row.prompt.slice(0, 200)), h("small", {}, ` seed ${row.seed}`)), ...trial.columns.map((column) => cell(column, index))])),
    trial.columns.filter((column) => column.problem).map((column) => problem(column.problem)),
    h("details", {}, h("summary", {}, "The same as commands"), trial.columns.map((column) => command(column.job.command))),
  );
};

export const compare = async (page) => {
  page.append(h("h1", {}, "Compare"));
  const names = studio.now.runs.filter((run) => run.step).map((run) => run.name);
  if (names.length < 2) return page.append(h("p", {}, "There are not yet two runs that have begun."));
  const boxes = names.map((name, index) => h("input", { type: "checkbox", value: name, checked: index < 2 }));
  const result = h("div", { class: "inner", "aria-live": "polite" });
  const look = trying(async () => {
    const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
    if (chosen.length < 2) return result.replaceChildren(h("p", { class: "muted" }, "Choose two or more."));
    const found = await get("compare", { names: chosen.join(",") });
    show(result, found.html);
    result.append(command(found.command));
    return undefined;
  });
  for (const box of boxes) box.addEventListener("change", look);
  page.append(h("fieldset", {}, h("legend", {}, "Runs"), boxes.map((box) => h("label", { class: "check" }, box, box.value))), result);
  await look();
};
