"use strict";
document.documentElement.classList.add("js");

const said = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : value.toLocaleString("en", { maximumSignificantDigits: 4 }));

// Curves: pointer or arrow keys move a cross through the measured points and read them out.
const wireCurves = (root) => {
  for (const chart of root.querySelectorAll(".chart")) {
    const data = JSON.parse(chart.dataset.points);
    const [plots, crosses] = [".plot", ".cross"].map((name) => [...chart.querySelectorAll(name)]); // one for each axis of values
    const output = chart.querySelector("output");
    const rest = output.textContent;
    let at = data.x.length - 1;
    const show = (index) => {
      at = Math.min(Math.max(index, 0), data.x.length - 1);
      for (const [scale, cross] of crosses.entries()) {
        cross.style.display = "block";
        cross.style.left = `${data.places[at] / 10}%`;
        cross.style.setProperty("--height", `${data.heights[scale][at] / 10}%`);
      }
      const here = data.values.map((values) => (values[at] === null ? null : said(values[at])));
      const told = data.names
        ? data.names.flatMap((name, line) => (here[line] === null ? [] : [`${name} ${here[line]}`])).join("; ")
        : `${here[0]}${here[1] ? ` (smoothed ${here[1]})` : ""}`;
      output.textContent = `step ${data.x[at].toLocaleString("en")}: ${told}`;
    };
    const hide = () => {
      for (const cross of crosses) cross.style.display = "none";
      output.textContent = rest;
    };
    const nearest = (place) => {
      let [low, high] = [0, data.places.length - 1];
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (data.places[middle] < place) low = middle;
        else high = middle;
      }
      return place - data.places[low] < data.places[high] - place ? low : high;
    };
    const follow = (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      show(nearest((1000 * (event.clientX - box.left)) / box.width));
    };
    for (const plot of plots) {
      plot.addEventListener("pointermove", follow);
      plot.addEventListener("pointerdown", follow);
      plot.addEventListener("pointerleave", hide);
    }
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const stride = event.shiftKey ? Math.ceil(data.x.length / 20) : 1;
      const to = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: data.x.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  }
};

// The axis of values of all curves that have a logarithmic one: a class of the whole page, so that it stays when curves are drawn anew.
const wireScales = (root) => {
  const page = document.documentElement.classList;
  const tell = (place) => place.querySelectorAll(".scale").forEach((button) => button.setAttribute("aria-pressed", String(page.contains("logarithmic"))));
  for (const button of root.querySelectorAll(".scale")) button.addEventListener("click", () => (page.toggle("logarithmic"), tell(document)));
  tell(root);
};

// Pictures: a picked picture of a row lies over the first one of that row, with a divider between.
const wirePictures = (root) => {
  const cards = [...root.querySelectorAll(".prompt")].filter((card) => card.querySelector(".stage"));
  const words = (pick) => `step ${Number(pick.dataset.step).toLocaleString("en")}`;
  const compare = (pick, scrolled = true) => {
    const card = pick.closest(".prompt");
    const first = pick.closest(".row").querySelector(".pick");
    for (const [name, source] of [["before", first], ["after", pick]]) {
      const [from, to] = [source.querySelector("img"), card.querySelector(`.wipe img.${name}`)];
      for (const key of ["src", "alt", "width", "height"]) to.setAttribute(key, from.getAttribute(key));
      card.querySelector(`.tag.${name}`).textContent = words(source);
    }
    for (const other of card.querySelectorAll(".pick")) other.setAttribute("aria-pressed", String(other === pick));
    const strip = card.querySelector(".strip");
    if (strip && scrolled) strip.scrollLeft += pick.getBoundingClientRect().right - strip.getBoundingClientRect().right + 4;
  };
  const steps = root.querySelector(".steps input");
  const allSteps = [...new Set([...root.querySelectorAll(".pick")].map((pick) => Number(pick.dataset.step)))].sort((a, b) => a - b);
  for (const card of cards) {
    const [wipe, divider] = [card.querySelector(".wipe"), card.querySelector(".stage input")];
    const cut = () => wipe.style.setProperty("--cut", `${divider.value}%`);
    const drag = (event) => {
      if (event.type === "pointermove" && event.buttons === 0 && event.pointerType !== "mouse") return;
      const box = wipe.getBoundingClientRect();
      divider.value = (100 * (event.clientX - box.left)) / box.width;
      cut();
    };
    divider.addEventListener("input", cut);
    wipe.addEventListener("pointerdown", drag);
    wipe.addEventListener("pointermove", drag);
    for (const pick of card.querySelectorAll(".pick")) pick.addEventListener("click", () => compare(pick));
    const row = [...card.querySelectorAll(".row")].find((line) => line.querySelector(".pick"));
    if (row) compare([...row.querySelectorAll(".pick")].at(-1), false); // the strip begins with its first step
  }
  steps?.addEventListener("input", () => {
    const step = allSteps[steps.value];
    root.querySelector(".steps output").textContent = `step ${step.toLocaleString("en")}`;
    for (const card of cards) {
      const row = (card.querySelector('.pick[aria-pressed="true"]') || card.querySelector(".pick")).closest(".row");
      // A row need not have every step: the latest one up to the chosen step, or its first, stands for it.
      const picks = [...row.querySelectorAll(".pick")];
      compare(picks.filter((pick) => Number(pick.dataset.step) <= step).at(-1) || picks[0]);
    }
  });
};

// Text to copy: where a page from a file may not use the clipboard, the text is selected instead.
const wireCopies = (root) => {
  for (const button of root.querySelectorAll(".copy")) {
    const code = button.parentElement.querySelector("code");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
  }
};

// Print shows everything.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));

for (const wire of [wireCurves, wireScales, wirePictures, wireCopies]) wire(document);
