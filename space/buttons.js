// Buttons with data-event are events of the server, which carry the index of their item.
const events = ["add_item", "remove_item", "clear_items", "forget_user", "resize"];
let focused = false;
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-event]");
  if (!button || !events.includes(button.dataset.event)) return;
  // The second half of a double click would fall on the item that has moved up.
  if (button.dataset.event === "add_item" && event.detail > 1) return;
  focused = true;
  trigger(button.dataset.event, button.dataset.index ? { index: Number(button.dataset.index) } : {});
});
element.addEventListener("change", (event) => {
  const { event: name, index } = event.target.dataset;
  if (events.includes(name)) trigger(name, { index: Number(index) });
});
watch("value", () => {
  // Where the button that had the focus is gone, the focus goes to its neighbour or to the search, not to the page's top.
  if (focused && (document.activeElement === document.body || !document.activeElement)) {
    const buttons = element.querySelectorAll("button.remove[data-index]");
    (buttons[buttons.length - 1] || document.querySelector("#item-search-input")).focus({ preventScroll: true });
  }
  focused = false;
  const link = element.querySelector("[data-link]");
  if (!link) return;
  // The address opens this visit again.
  const address = new URL(window.location.href);
  address.searchParams.delete("item");
  address.searchParams.delete("user");
  new URLSearchParams(link.dataset.link).forEach((value, name) => address.searchParams.append(name, value));
  window.history.replaceState(window.history.state, "", address);
});
// An item that one points at in a list is lit on the map.
const light = (event, on) => {
  const row = event.target.closest("[data-index]");
  if (!row) return;
  document.querySelectorAll(`.pin[data-index="${row.dataset.index}"]`).forEach((pin) => pin.classList.toggle("lit", on));
};
for (const [name, on] of [["pointerover", true], ["focusin", true], ["pointerout", false], ["focusout", false]])
  element.addEventListener(name, (event) => light(event, on));
