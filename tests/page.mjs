// Runs a page of actdb.plots under a small stand-in of the DOM: node page.mjs PAGE.html '[["focus", 3], ["head", 1], …]'
// Prints what the page then shows, as JSON.
import fs from "node:fs";

class Element {
  constructor(tag) {
    Object.assign(this, {tag, children: [], style: {}, classes: new Set(), listeners: {}, attributes: {}, own: ""});
    this.classList = {toggle: (name, on) => (on ? this.classes.add(name) : this.classes.delete(name))};
  }
  append(...children) {
    this.children.push(...children);
  }
  replaceChildren(...children) {
    this.children = children;
  }
  get textContent() {
    return this.own + this.children.map(child => (typeof child === "string" ? child : child.textContent)).join("");
  }
  set textContent(text) {
    this.children = [];
    this.own = text;
  }
  addEventListener(kind, listener) {
    this.listeners[kind] = listener;
  }
  setAttribute(name, value) {
    this.attributes[name] = String(value);
  }
  getContext() {
    return {
      createImageData: (width, height) => ({data: new Uint8ClampedArray(4 * width * height)}),
      putImageData: image => { this.image = image; },
      fillRect() {},
    };
  }
}

const page = fs.readFileSync(process.argv[2], "utf8");
const scripts = [...page.matchAll(/<script([^>]*)>([^]*?)<\/script>/g)];
const named = {data: Object.assign(new Element("script"), {own: scripts[0][2]})};
const choices = [...page.matchAll(/<input type="radio" name="direction" value="(\w+)"/g)].map(
  ([, value]) => Object.assign(new Element("input"), {value}));
globalThis.document = {
  getElementById: id => (named[id] ??= new Element(id)),
  createElement: tag => new Element(tag),
  querySelectorAll: query => (query === "#heads button" ? (named.heads?.children ?? []) : choices),
};
(0, eval)(scripts[1][2]);

const spans = named.text.children.filter(child => child.tag === "span");
for (const [what, which] of JSON.parse(process.argv[3])) {
  if (what === "head") named.heads.children[which].listeners.click();
  else if (what === "direction") choices.find(choice => choice.value === which).listeners.change();
  else if (what === "column") named.columns.children.find(label => label.textContent.includes(which)).children[0].listeners.change();
  else spans[which].listeners[what]();
}
console.log(JSON.stringify({
  spans: spans.map(span => ({text: span.textContent, title: span.title, background: span.style.backgroundColor, classes: [...span.classes]})),
  rows: (named.rows?.children ?? []).map(row => row.children.map(cell => cell.textContent)),
  column: named.column?.textContent,
  shown: named.shown?.textContent,
  most: named.most?.textContent,
  unit: named.unit?.textContent,
  pictures: (named.heads?.children ?? []).map(button => [...button.children[0].image.data]),
}));
