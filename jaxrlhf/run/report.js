// What the page does beside being read: values under the pointer, search, following a live run.
"use strict";

/** The places of a curve's points, [x, y] in units of the drawing, in the order of its values. */
function placesOf(curve) {
  const line = curve.querySelector("polyline");
  if (line) return line.getAttribute("points").split(" ").map((at) => at.split(",").map(Number));
  const dots = [...curve.querySelectorAll("circle")];
  return dots.map((dot) => [Number(dot.getAttribute("cx")), Number(dot.getAttribute("cy"))]);
}

/** The index of the point that is nearest across. */
function nearest(places, x) {
  let best = 0;
  places.forEach((place, i) => {
    if (Math.abs(place[0] - x) < Math.abs(places[best][0] - x)) best = i;
  });
  return best;
}

function added(parent, name, text, namespace) {
  const child = namespace
    ? document.createElementNS(namespace, name)
    : document.createElement(name);
  if (text !== undefined) child.textContent = text;
  return parent.appendChild(child);
}

/** Show what the curves of a chart are worth where the pointer is. */
function point(figure, event) {
  const svg = figure.querySelector("svg");
  const box = svg.getBoundingClientRect();
  const view = svg.viewBox.baseVal;
  const x = ((event.clientX - box.left) / box.width) * view.width;
  const curves = [...svg.querySelectorAll("g[data-name]")].map((curve) => {
    const places = placesOf(curve);
    return { curve, places, at: nearest(places, x) };
  });
  const away = ({ places, at }) => Math.abs(places[at][0] - x);
  const first = curves.reduce((a, b) => (away(b) < away(a) ? b : a));
  const across = first.places[first.at][0];
  const ruler = svg.querySelector(".ruler") || added(svg, "line", undefined, svg.namespaceURI);
  ruler.setAttribute("class", "ruler");
  ruler.setAttribute("x1", across);
  ruler.setAttribute("x2", across);
  ruler.setAttribute("y1", 10);
  ruler.setAttribute("y2", view.height - 34);
  let tip = figure.querySelector(".tip");
  if (!tip) {
    tip = added(figure, "div");
    tip.className = "tip";
  }
  tip.replaceChildren();
  tip.hidden = false;
  const axis = svg.querySelector(".name").textContent;
  added(tip, "div", `${axis} ${first.curve.dataset.x.split("|")[first.at]}`);
  for (const { curve, places, at } of curves) {
    // A curve that has no point there says nothing of it.
    if (Math.abs(places[at][0] - across) > 6) continue;
    const row = added(tip, "div", `${curve.dataset.name} ${curve.dataset.y.split("|")[at]}`);
    row.className = curve.getAttribute("class");
  }
  const frame = figure.getBoundingClientRect();
  const left = box.left - frame.left + (across / view.width) * box.width;
  const room = frame.width - tip.offsetWidth - 4;
  const beside = left + 10 > room ? left - tip.offsetWidth - 10 : left + 10;
  tip.style.left = `${Math.max(4, Math.min(beside, room))}px`;
  tip.style.top = `${box.top - frame.top + 12}px`;
}

function leave(figure) {
  figure.querySelector(".ruler")?.remove();
  const tip = figure.querySelector(".tip");
  if (tip) tip.hidden = true;
}

/** Hide the samples of a section without the words that are looked for. */
function search(field) {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const sample of field.closest("section").querySelectorAll(".sample")) {
    const text = sample.textContent.toLowerCase();
    sample.hidden = !words.every((word) => text.includes(word));
  }
  const more = field.closest("section").querySelector(".more");
  if (more && words.length) more.open = true;
}

/** Make what is on the page answer. */
function enliven() {
  for (const figure of document.querySelectorAll("figure")) {
    const svg = figure.querySelector("svg");
    svg.addEventListener("pointermove", (event) => point(figure, event));
    svg.addEventListener("pointerleave", () => leave(figure));
  }
  for (const field of document.querySelectorAll(".search")) {
    field.addEventListener("input", () => search(field));
  }
}

/** Put a newer page in place of this one, and what a reader has opened and searched as it was. */
function renew(text) {
  const next = new DOMParser().parseFromString(text, "text/html");
  const main = document.querySelector("main");
  const searched = [...main.querySelectorAll(".search")].map((x) => [x.ariaLabel, x.value]);
  const open = [...main.querySelectorAll("details")].map((x) => x.open);
  main.replaceWith(document.adoptNode(next.querySelector("main")));
  document.title = next.title;
  const folds = [...document.querySelectorAll("details")];
  // The same parts, or others have come up: then all stay closed.
  if (folds.length === open.length) folds.forEach((x, i) => { x.open = open[i]; });
  enliven();
  for (const field of document.querySelectorAll(".search")) {
    field.value = searched.find(([label]) => label === field.ariaLabel)?.[1] ?? "";
    search(field);
  }
}

function say(text) {
  document.querySelector("#state").textContent = text;
}

/** Ask for a newer page every few seconds. */
async function follow(tag) {
  try {
    const answer = await fetch("/", { headers: { "If-None-Match": tag }, cache: "no-store" });
    const busy = document.activeElement?.matches(".search") || String(getSelection());
    if (answer.status === 200 && !busy) {
      renew(await answer.text());
      tag = answer.headers.get("ETag") ?? "";
    }
    const how = busy ? "Waits while you search or select" : "Follows the run";
    const time = new Date().toLocaleTimeString();
    say(answer.status < 400 ? `${how}: as of ${time}.` : await answer.text());
  } catch {
    say("The server of this page has ended: this is what it knew last.");
  }
  setTimeout(follow, 3000, tag);
}

enliven();
if (document.body.hasAttribute("data-live")) setTimeout(follow, 3000, "");
