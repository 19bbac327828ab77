// Which page is shown: the address after #.
import { get, h, listen, problem, Refused, studio, unwatch } from "./core.js";
import { pictures } from "./pictures.js";
import { settings } from "./settings.js";
import { training } from "./training.js";
import { compare, tries } from "./trying.js";

const PAGES = { pictures, settings, training, try: tries, compare };
const content = document.getElementById("content");
let turn = 0;

const go = async () => {
  const name = location.hash.slice(1);
  if (name === "content") return content.focus();
  const page = PAGES[name] ? name : "pictures";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${page}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const mine = ++turn;
  unwatch();
  const place = h("div", {});
  try {
    studio.begun ??= await get("begin");
    studio.now = await get("watched");
    await PAGES[page](place, go);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    place.replaceChildren(problem(error));
  }
  if (mine === turn) content.replaceChildren(place);
  document.title = `${page[0].toUpperCase()}${page.slice(1)} · sdxl studio`;
};

addEventListener("hashchange", go);
await go();
listen();
